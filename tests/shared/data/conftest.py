"""Small images and folders of them to make data sets of."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from medloop.vision.encode import encode_png
from numpy.typing import NDArray

Picture = Callable[..., bytes]
WriteTree = Callable[[Mapping[str, bytes]], Path]


@pytest.fixture(scope="session")
def pixels() -> Callable[..., NDArray[np.uint8]]:
    """`pixels(seed, size, channels)`: smooth noise, so that two seeds are nowhere near one another."""

    def draw(seed: int, size: int = 24, channels: int = 1) -> NDArray[np.uint8]:
        coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, channels), dtype=np.uint8)
        return np.kron(coarse, np.ones((size // 8, size // 8, 1), dtype=np.uint8))

    return draw


@pytest.fixture(scope="session")
def picture(pixels: Callable[..., NDArray[np.uint8]]) -> Picture:
    """`picture(seed, size, channels)`: the same as PNG."""
    return lambda *args, **kwargs: encode_png(pixels(*args, **kwargs))


@pytest.fixture
def write_tree(tmp_path: Path) -> WriteTree:
    """Write files by relative path into a new folder `images`."""

    def write(files: Mapping[str, bytes]) -> Path:
        root = tmp_path / "images"
        for name, data in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        return root

    return write
