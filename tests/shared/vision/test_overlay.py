"""Pictures for people show what they say they show."""

from collections.abc import Callable

import numpy as np
import pytest
from medloop.vision.decode import decode
from medloop.vision.overlay import enlarge, overlay
from numpy.typing import NDArray

GREY = np.full((8, 8, 1), 128, np.uint8)


def channels(data: bytes) -> NDArray[np.int64]:
    return decode(data).pixels.astype(np.int64)


@pytest.mark.parametrize(("side", "expected"), [(1, 256), (28, 280), (64, 256), (255, 510), (256, 256), (300, 300)])
def test_enlarged_by_the_smallest_whole_factor(side: int, expected: int) -> None:
    assert decode(enlarge(np.zeros((side, side, 1), np.uint8))).pixels.shape == (expected, expected, 1)


def test_enlarging_invents_no_values(make_picture: Callable[[int], NDArray[np.uint8]]) -> None:
    pixels = make_picture(3)
    large = decode(enlarge(pixels, minimum_side=26)).pixels
    for row in range(2):
        for column in range(2):
            np.testing.assert_array_equal(large[row::2, column::2], pixels)


def test_nothing_attributed_leaves_the_grey_image(make_picture: Callable[[int], NDArray[np.uint8]]) -> None:
    pixels = make_picture(1)
    shown = decode(overlay(pixels, np.zeros(pixels.shape[:2]), scale=1)).pixels
    np.testing.assert_array_equal(shown, pixels.repeat(3, axis=2))


def test_red_speaks_for_and_blue_against() -> None:
    attribution = np.zeros((8, 8))
    attribution[:, :4], attribution[:, 4:] = 1.0, -1.0
    shown = channels(overlay(GREY, attribution, scale=1))
    assert (shown[:, :3, 0] > shown[:, :3, 2] + 50).all()
    assert (shown[:, 5:, 2] > shown[:, 5:, 0] + 50).all()


def test_scaling_an_attribution_does_not_change_its_picture() -> None:
    attribution = np.random.default_rng(0).normal(size=(8, 8))
    assert overlay(GREY, attribution) == overlay(GREY, attribution * 1024)


def test_one_peak_does_not_hide_the_rest() -> None:
    attribution = np.full((32, 32), 1.0)
    attribution[0, 0] = 1000.0
    shown = channels(overlay(np.full((32, 32, 1), 128, np.uint8), attribution, scale=1))
    np.testing.assert_array_equal(shown[16, 16], shown[0, 0])


def test_a_single_attributed_pixel_shows() -> None:
    attribution = np.zeros((32, 32))
    attribution[5, 7] = 1e-9
    shown = channels(overlay(np.full((32, 32, 1), 128, np.uint8), attribution, scale=1))
    assert np.argwhere(shown[..., 0] != shown[..., 2]).tolist() == [[5, 7]]


def test_a_coarse_map_is_stretched_over_the_image() -> None:
    attribution = np.array([[1.0, 0.0], [0.0, 0.0]])
    shown = channels(overlay(GREY, attribution))
    redness = shown[..., 0] - shown[..., 2]
    assert shown.shape == (256, 256, 3)
    assert redness[:64, :64].min() > 50
    assert not redness[192:, 192:].any()


def test_colour_images_are_shown_in_grey_below(make_picture: Callable[[int], NDArray[np.uint8]]) -> None:
    shown = channels(overlay(make_picture(3), np.zeros((2, 2)), scale=1))
    assert (shown[..., 0] == shown[..., 1]).all()
    assert (shown[..., 1] == shown[..., 2]).all()


@pytest.mark.parametrize("bad", [np.zeros(8), np.zeros((8, 8, 1)), np.full((8, 8), np.nan), np.full((8, 8), np.inf)])
def test_attributions_that_make_no_picture_are_refused(bad: NDArray[np.float64]) -> None:
    with pytest.raises(ValueError, match=r"\[h, w\]|finite"):
        overlay(GREY, bad)
