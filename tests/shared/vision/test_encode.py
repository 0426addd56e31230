"""Writing PNG, and freeing files of metadata without touching a pixel."""

import hashlib
from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from medloop.errors import ImageTooLarge, InvalidImage
from medloop.vision.containers import sniff
from medloop.vision.decode import Limits, decode
from medloop.vision.encode import encode_png, encode_png_canonical, strip_metadata
from numpy.typing import NDArray
from PIL import Image

Encode = Callable[[NDArray[np.uint8]], bytes]

shapes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
images = st.one_of(
    shapes.flatmap(lambda shape: st_numpy.arrays(np.uint8, shape)),
    shapes.flatmap(lambda shape: st_numpy.arrays(np.uint16, (*shape[:2], 1))),
)


@pytest.mark.parametrize("encode", [encode_png, encode_png_canonical])
@settings(max_examples=60, deadline=None)
@given(pixels=images)
def test_pixels_survive_the_round_trip(encode: Encode, pixels: NDArray[np.uint8]) -> None:
    decoded = decode(encode(pixels)).pixels
    assert decoded.dtype == pixels.dtype
    np.testing.assert_array_equal(decoded, pixels)


@pytest.mark.parametrize("encode", [encode_png, encode_png_canonical])
def test_two_dimensions_mean_grey(encode: Encode, make_picture: Callable[[int], NDArray[np.uint8]]) -> None:
    assert encode(make_picture(1)[..., 0]) == encode(make_picture(1))


@pytest.mark.parametrize("side", [255, 256, 400])
def test_images_of_more_than_one_stored_block_survive(side: int) -> None:
    # 255 × (255 + 1) + 255 bytes is just below, the others are above the 65,535 bytes of a stored block.
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 1), dtype=np.uint8)
    np.testing.assert_array_equal(decode(encode_png_canonical(pixels)).pixels, pixels)


def test_canonical_bytes_are_the_same_everywhere() -> None:
    pixels = (np.arange(300 * 301 * 3) % 251).astype(np.uint8).reshape(300, 301, 3)
    assert hashlib.sha256(encode_png_canonical(pixels)).hexdigest()[:16] == "c83ba413b61471bf"
    deep = (np.arange(20 * 30) * 101).astype(np.uint16).reshape(20, 30)
    assert hashlib.sha256(encode_png_canonical(deep)).hexdigest()[:16] == "32132eec3e524ddf"


def test_canonical_bytes_do_not_depend_on_memory_layout(make_picture: Callable[[int], NDArray[np.uint8]]) -> None:
    pixels = make_picture(3)
    assert encode_png_canonical(np.asfortranarray(pixels)) == encode_png_canonical(pixels)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4, 5), np.uint8),
        np.zeros((0, 4, 1), np.uint8),
        np.zeros((4,), np.uint8),
        np.zeros((4, 4, 3), np.uint16),
        np.zeros((4, 4, 1), np.float32),
    ],
    ids=["five channels", "no rows", "one dimension", "deep colour", "floats"],
)
def test_what_no_png_can_hold_is_refused(pixels: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match="a PNG needs"):
        encode_png(pixels)


def test_stripping_changes_no_pixel(sample: bytes) -> None:
    before, after = decode(sample).pixels, decode(strip_metadata(sample)).pixels
    assert after.dtype == before.dtype
    np.testing.assert_array_equal(after, before)


def test_stripping_leaves_no_metadata(sample: bytes, secret: bytes) -> None:
    stripped = strip_metadata(sample)
    assert secret not in stripped
    with Image.open(BytesIO(stripped)) as image:
        image.load()
        assert not image.getexif()
        assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density", "adobe", "adobe_transform"} | {
            "progressive",
            "progression",
            "transparency",
        }


def test_stripping_twice_changes_nothing_more(sample: bytes) -> None:
    once = strip_metadata(sample)
    assert strip_metadata(once) == once


def test_samples_hold_something_to_strip(samples: dict[str, bytes], secret: bytes) -> None:
    assert sum(secret in data for data in samples.values()) >= 10


@pytest.mark.parametrize("name", ["jpeg-rgb", "jpeg-progressive", "jpeg-orientation-1"])
def test_upright_jpeg_stays_jpeg(samples: dict[str, bytes], name: str) -> None:
    assert sniff(strip_metadata(samples[name])) == "JPEG"


@pytest.mark.parametrize("name", ["jpeg-orientation-6", "tiff-16-bit", "gif", "bmp-rgb", "webp"])
def test_everything_else_becomes_canonical_png(samples: dict[str, bytes], name: str) -> None:
    assert strip_metadata(samples[name]) == encode_png_canonical(decode(samples[name]).pixels)


def test_stripping_refuses_what_decoding_refuses(samples: dict[str, bytes]) -> None:
    for data in (b"", b"not an image", samples["jpeg-rgb"][:-40], samples["png-rgb"][:-40]):
        with pytest.raises(InvalidImage):
            strip_metadata(data)
    with pytest.raises(ImageTooLarge):
        strip_metadata(samples["gif"], Limits(max_pixels=10))
