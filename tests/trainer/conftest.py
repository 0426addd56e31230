"""The trainer's fixtures."""

import pytest
from medloop_trainer.device import Device, choose_device
from medloop_trainer.loop import Images

from .tiny import tiny_images


@pytest.fixture(scope="session")
def device() -> Device:
    return choose_device()


@pytest.fixture(scope="session")
def images() -> Images:
    return tiny_images()
