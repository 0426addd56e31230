from pathlib import Path

import pytest
import torch
from medloop_trainer.device import available_cpus, choose_device


@pytest.mark.parametrize(("quota", "cpus"), [("50000 100000", 1), ("100000 100000", 1), ("max 100000", None)])
def test_a_containers_quota_bounds_the_threads(quota: str, cpus: int | None, tmp_path: Path) -> None:
    path = tmp_path / "cpu.max"
    path.write_text(quota + "\n")
    assert available_cpus(path) == (cpus or available_cpus(tmp_path / "absent"))
    assert available_cpus(path) >= 1


def test_the_device_can_multiply_in_its_type() -> None:
    device = choose_device()
    assert device.threads == torch.get_num_threads()
    with torch.autocast(device.name, device.autocast, enabled=device.mixed):
        product = torch.ones(2, 2, device=device.name) @ torch.ones(2, 2, device=device.name)
    assert product.dtype == device.autocast
