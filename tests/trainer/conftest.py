"""The trainer's fixtures."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from medloop_trainer.device import Device, choose_device
from medloop_trainer.loop import Images

from .lineage import Founded, Lineage, found, lineage_in
from .tiny import tiny_images


@pytest.fixture(scope="session")
def device() -> Device:
    return choose_device()


@pytest.fixture(scope="session")
def images() -> Images:
    return tiny_images()


@contextmanager
def single_thread(afterwards: int) -> Iterator[None]:
    """One thread in this process and in those that it starts, until it has so many again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(afterwards)


@pytest.fixture(scope="module")
def one_thread(device: Device) -> Iterator[None]:
    """For batches so small that two threads only wait for each other, on a busy machine for seconds."""
    with single_thread(device.threads):
        yield


@pytest.fixture(scope="session")
def founded(tracking_template: Path, tmp_path_factory: pytest.TempPathFactory, device: Device) -> Founded:
    with single_thread(device.threads):
        return found(tracking_template, tmp_path_factory.mktemp("founded"))


@pytest.fixture(scope="module")
def lineage(founded: Founded, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lineage]:
    """Each module's own: what it does to it, others do not see."""
    with lineage_in(tmp_path_factory.mktemp("lineage"), founded) as its_own:
        yield its_own
