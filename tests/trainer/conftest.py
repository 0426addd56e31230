"""The trainer's fixtures."""

from collections.abc import Iterator

import pytest
import torch
from medloop_trainer.device import Device, choose_device
from medloop_trainer.loop import Images

from .tiny import tiny_images


@pytest.fixture(scope="session")
def device() -> Device:
    return choose_device()


@pytest.fixture(scope="session")
def images() -> Images:
    return tiny_images()


@pytest.fixture(scope="module")
def one_thread(device: Device) -> Iterator[None]:
    """For networks so tiny that two threads only wait for each other, on a busy machine for seconds."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(device.threads)
