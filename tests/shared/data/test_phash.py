"""The perceptual hash: closed forms, and what it must not notice."""

from collections.abc import Callable

import numpy as np
import pytest
from medloop.data.phash import FORMS, SIDE, _cosines, hash_plane, perceptual_hashes
from numpy.typing import NDArray

Draw = Callable[..., NDArray[np.uint8]]


def hashes(*images: NDArray[np.uint8] | NDArray[np.uint16]) -> NDArray[np.uint64]:
    return perceptual_hashes(np.stack([hash_plane(image) for image in images]))


def bits(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> int:
    return int(np.bitwise_count(one[0] ^ other[0]))


def test_cosines_are_orthonormal() -> None:
    np.testing.assert_allclose(_cosines() @ _cosines().T, np.eye(8), atol=1e-12)


@pytest.mark.parametrize("shape", [(64, 64), (28, 28), (32, 32), (77, 41), (5, 300), (1, 1)])
def test_areas_keep_the_mean_and_flat_stays_flat(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 1), dtype=np.uint8)
    assert hash_plane(image).mean() == pytest.approx(image.mean(), rel=1e-5)
    np.testing.assert_allclose(hash_plane(np.full_like(image, 77)), 77, rtol=1e-6)


def test_areas_of_twice_the_side_are_means_of_four(pixels: Draw) -> None:
    image = pixels(1, 64)
    expected = image[..., 0].reshape(SIDE, 2, SIDE, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(hash_plane(image), expected, rtol=1e-6)


def test_a_wave_sets_its_own_bit() -> None:
    """An image that is one cosine has one coefficient above the median (which is 0), beside the constant one."""
    wave = np.cos(np.pi * 3 * (2 * np.arange(SIDE) + 1) / (2 * SIDE))
    plane = 128 + 100 * np.outer(np.ones(SIDE), wave)
    (value,) = perceptual_hashes(plane[np.newaxis])[:, 0].tolist()
    assert value == 1 << 63 | 1 << 60


def test_forms_are_the_hashes_of_mirrored_and_turned_images(pixels: Draw) -> None:
    image = pixels(2, 48)
    turned = [np.rot90(side, k).copy() for side in (image, image[:, ::-1]) for k in range(4)]
    assert sorted(hashes(image)[0].tolist()) == sorted(hashes(*turned)[:, 0].tolist())
    assert hashes(image).shape == (1, FORMS)


def test_scale_brightness_depth_and_channels_hardly_matter(pixels: Draw) -> None:
    image = pixels(3, 64)
    (plain,) = hashes(image)
    double = image.repeat(2, 0).repeat(2, 1)
    dim = (image // 2 + 20).astype(np.uint8)
    deep = image.astype(np.uint16) * 257
    colour = image.repeat(3, axis=2)
    veiled = np.concatenate([image, np.full_like(image, 255)], axis=2)
    for other in hashes(double, dim, deep, colour, veiled):
        assert bits(plain[:1], other[:1]) <= 2


def test_different_images_are_far_apart(pixels: Draw) -> None:
    found = hashes(*(pixels(seed) for seed in range(40)))[:, 0]
    distances = np.bitwise_count(found[:, np.newaxis] ^ found)
    assert distances[~np.eye(40, dtype=bool)].min() > 8


def test_flat_images_are_alike_whatever_their_size_and_shade() -> None:
    flat = [np.full((size, size, 1), shade, np.uint8) for size in (28, 64, 77) for shade in (1, 100, 255)]
    assert len(set(hashes(*flat)[:, 0].tolist())) == 1


def test_transparent_parts_are_black(pixels: Draw) -> None:
    image = pixels(4)
    clear = np.concatenate([image, np.zeros_like(image)], axis=2)
    np.testing.assert_array_equal(hash_plane(clear), 0)
