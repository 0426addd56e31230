"""Images for a browser."""

import base64

import numpy as np
import pytest
from medloop.errors import InvalidImage
from medloop.vision.decode import decode
from medloop.vision.encode import encode_png
from medloop_dashboard.pictures import LARGEST_SIDE, thumbnail, viewable


def test_small_images_are_magnified_without_inventing_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (28, 40, 3), dtype=np.uint8)
    shown = decode(viewable(encode_png(pixels))).pixels
    factor = shown.shape[0] // 28
    assert factor > 1
    assert np.array_equal(shown, pixels.repeat(factor, axis=0).repeat(factor, axis=1))


def test_sixteen_bits_are_spread_over_eight() -> None:
    pixels = np.linspace(1000, 3000, 64 * 64).astype(np.uint16).reshape(64, 64)
    shown = decode(viewable(encode_png(pixels))).pixels
    assert shown.dtype == np.uint8
    assert (shown.min(), shown.max()) == (0, 255)
    flat = decode(viewable(encode_png(np.full((8, 8), 77, np.uint16)))).pixels
    assert not flat.any()


def test_large_images_are_made_fit_for_a_page() -> None:
    shown = decode(viewable(encode_png(np.zeros((LARGEST_SIDE + 1, 300, 1), np.uint8)))).pixels
    assert max(shown.shape) == LARGEST_SIDE


def test_thumbnails_are_png_addresses() -> None:
    prefix, _, body = thumbnail(encode_png(np.full((300, 200), 90, np.uint8))).partition(",")
    assert prefix == "data:image/png;base64"
    assert decode(base64.b64decode(body)).pixels.shape[:2] == (96, 96)


def test_what_is_no_image_is_refused_in_our_own_words() -> None:
    with pytest.raises(InvalidImage):
        viewable(b"no image")
    with pytest.raises(InvalidImage):
        thumbnail(b"")
