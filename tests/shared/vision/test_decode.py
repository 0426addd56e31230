"""Decoding: the pixels are right for every kind of file, and whatever is wrong is said in our own words."""

import hashlib
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from medloop.errors import ImageTooLarge, InvalidImage, UnsupportedImage
from medloop.vision.decode import Limits, Pixels, decode, pixel_hash, read_header
from medloop.vision.encode import encode_png_canonical
from numpy.typing import NDArray
from PIL import Image, ImageOps

CHANNELS = {
    "jpeg-grey": 1,
    "jpeg-rgb": 3,
    "jpeg-progressive": 3,
    "jpeg-cmyk": 3,
    "png-bilevel": 1,
    "png-bilevel-transparent": 2,
    "png-grey": 1,
    "png-grey-transparent": 2,
    "png-grey-alpha": 2,
    "png-16-bit": 1,
    "png-rgb-transparent": 4,
    "png-palette": 3,
    "png-palette-transparent": 4,
    "png-one-pixel": 1,
    "bmp-bilevel": 1,
    "bmp-rgb": 3,
    "gif": 3,
    "gif-transparent": 4,
    "tiff-cmyk": 3,
    "tiff-ycbcr": 3,
    "webp": 3,
    "webp-alpha": 4,
}

# Damage is done to small files of each format, so that it hits structure more often than pixels.
SEEDS = (
    "jpeg-progressive",
    "jpeg-cmyk",
    "png-palette-transparent",
    "png-16-bit",
    "bmp-rgb",
    "gif-animated",
    "webp-alpha",
)


def test_every_sample_becomes_a_contiguous_array_of_a_promised_layout(sample: bytes) -> None:
    pixels = decode(sample).pixels
    assert pixels.ndim == 3
    assert pixels.flags.c_contiguous
    assert pixels.dtype == np.uint8 or (pixels.dtype == np.uint16 and pixels.shape[2] == 1)
    assert 1 <= pixels.shape[2] <= 4


def test_header_announces_the_size_that_decoding_gives(sample: bytes) -> None:
    header, decoded = read_header(sample), decode(sample)
    assert header.format == decoded.format
    assert sorted((header.height, header.width)) == sorted(decoded.pixels.shape[:2])


@pytest.mark.parametrize(("name", "channels"), CHANNELS.items())
def test_mode_decides_the_channels(samples: dict[str, bytes], name: str, channels: int) -> None:
    assert decode(samples[name]).pixels.shape[2] == channels


@pytest.mark.parametrize(
    ("name", "channels", "factor"),
    [
        ("png-grey", 1, 1),
        ("png-grey-alpha", 2, 1),
        ("png-rgb", 3, 1),
        ("png-rgba", 4, 1),
        ("png-16-bit", 1, 257),
        ("png-animated", 3, 1),
        ("bmp-grey", 1, 1),
        ("bmp-rgb", 3, 1),
        ("tiff-grey", 1, 1),
        ("tiff-16-bit", 1, 257),
        ("tiff-32-bit", 1, 100),
        ("tiff-lzw", 4, 1),
        ("webp", 3, 1),
        ("webp-alpha", 4, 1),
        ("webp-animated", 3, 1),
    ],
)
def test_lossless_formats_give_back_what_was_saved(
    samples: dict[str, bytes],
    make_picture: Callable[[int], NDArray[np.uint8]],
    name: str,
    channels: int,
    factor: int,
) -> None:
    expected = make_picture(channels).astype(np.int64) * factor
    np.testing.assert_array_equal(decode(samples[name]).pixels, expected)


@pytest.mark.parametrize("name", ["jpeg-grey", "jpeg-rgb", "jpeg-progressive", "jpeg-restarts", "jpeg-profile"])
def test_jpeg_gives_the_decoders_own_pixels(samples: dict[str, bytes], name: str) -> None:
    with Image.open(BytesIO(samples[name])) as image:
        expected = np.atleast_3d(np.asarray(image))
    np.testing.assert_array_equal(decode(samples[name]).pixels, expected)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("file_format", ["jpeg", "png", "webp", "tiff"])
def test_exif_orientation_is_applied(samples: dict[str, bytes], file_format: str, turn: int) -> None:
    data = samples[f"{file_format}-orientation-{turn}"]
    with Image.open(BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    pixels = decode(data).pixels
    np.testing.assert_array_equal(pixels, expected[..., np.newaxis] if expected.ndim == 2 else expected)
    assert pixels.shape[:2] == ((13, 17) if turn < 5 else (17, 13))


def test_transparent_colour_becomes_alpha(samples: dict[str, bytes]) -> None:
    pixels = decode(samples["png-grey-transparent"]).pixels
    np.testing.assert_array_equal(pixels[..., 1] == 0, pixels[..., 0] == 12)
    assert (pixels[..., 1] == 0).any()


@pytest.mark.parametrize("mode", ["F", "LAB"])
def test_pixels_that_no_model_takes_are_unsupported(save: Callable[..., bytes], mode: str) -> None:
    with pytest.raises(UnsupportedImage, match="save it as"):
        decode(save(Image.new(mode, (4, 4)), "TIFF"))


@pytest.mark.parametrize("value", [-1, 65_536])
def test_integers_beyond_16_bits_are_unsupported(save: Callable[..., bytes], value: int) -> None:
    with pytest.raises(UnsupportedImage, match="0–65535"):
        decode(save(Image.new("I", (4, 4), value), "TIFF"))


@pytest.mark.parametrize("data", [b"not an image", b"%PDF-1.7", b"<svg/>", b"\x00\x00\x01\x00\x01\x00", b"\xff"])
def test_what_is_no_image_is_unsupported(data: bytes) -> None:
    with pytest.raises(UnsupportedImage, match="JPEG, PNG"):
        decode(data)


def test_empty_file_is_named_so() -> None:
    with pytest.raises(InvalidImage, match="empty file"):
        decode(b"")


def test_truncated_file_is_invalid_wherever_it_ends(sample: bytes) -> None:
    for keep in (0.3, 0.6, 0.9):
        cut = sample[: int(len(sample) * keep)]
        try:
            pixels = decode(cut).pixels
        except InvalidImage:
            continue
        # The cut fell behind the first image: later frames, a second image, or what follows the end.
        np.testing.assert_array_equal(pixels, decode(sample).pixels)


@pytest.mark.parametrize("name", ["jpeg-rgb", "jpeg-progressive", "png-rgb", "bmp-rgb", "tiff-grey", "webp"])
@pytest.mark.parametrize("missing", [2, 40])
def test_truncated_single_image_never_decodes(samples: dict[str, bytes], name: str, missing: int) -> None:
    with pytest.raises(InvalidImage, match=r"truncated|damaged"):
        decode(samples[name][:-missing])


def test_huge_header_is_refused_before_pixels_take_memory(make_png_header: Callable[[int, int], bytes]) -> None:
    # In a process of its own that may not hold 1 GiB: the pixels would take 3.6.
    program = """if True:
        import resource, sys
        from medloop.errors import ImageTooLarge
        from medloop.vision.decode import decode
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
        try:
            decode(sys.stdin.buffer.read())
        except ImageTooLarge as error:
            sys.exit(error.detail)
    """
    command = [sys.executable, "-c", program]
    result = subprocess.run(
        command, input=make_png_header(60_000, 60_000), capture_output=True, timeout=60, check=False
    )
    assert result.returncode == 1
    assert "60,000×60,000" in result.stderr.decode()


@pytest.mark.parametrize(
    "limits",
    [Limits(max_bytes=60), Limits(max_pixels=13 * 17 - 1), Limits(max_side=16)],
    ids=["bytes", "pixels", "side"],
)
def test_each_limit_is_enforced(sample: bytes, limits: Limits) -> None:
    if read_header(sample).width == 1:
        assert decode(sample, Limits(max_pixels=1, max_side=1)).pixels.shape[:2] == (1, 1)
        return
    for read in (decode, read_header):
        with pytest.raises(ImageTooLarge, match="send a smaller one"):
            read(sample, limits)


@pytest.mark.parametrize("side", [9_500, 13_400, 20_000])
def test_the_librarys_own_size_limit_never_shows(make_png_header: Callable[[int, int], bytes], side: int) -> None:
    # PIL warns from 89 and raises from 179 million pixels on; here warnings are errors.
    with pytest.raises(ImageTooLarge, match="allowed are 50,000,000"):
        decode(make_png_header(side, side))
    assert read_header(make_png_header(side, side), Limits(max_pixels=side * side)).width == side


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_bytes_raise_anything_but_our_own_error(data: st.DataObject) -> None:
    signature = data.draw(
        st.sampled_from(
            [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF89a", b"II*\x00", b"RIFF\x40\0\0\0WEBP"]
        )
    )
    try:
        decode(signature + data.draw(st.binary(max_size=200)))
    except InvalidImage:
        return


@pytest.mark.parametrize("name", [*SEEDS, "tiff-lzw", "jpeg-orientation-6", "png-orientation-6"])
def test_no_damage_raises_anything_but_our_own_error(samples: dict[str, bytes], name: str) -> None:
    original, random = samples[name], np.random.default_rng(0)
    small = Limits(max_pixels=100_000)
    for _ in range(150):
        damaged = bytearray(original)
        for position in random.integers(0, len(damaged), size=random.integers(1, 6)):
            damaged[position] = random.integers(0, 256)
        try:
            decode(bytes(damaged), small)
        except InvalidImage:
            continue


def test_pixel_hash_depends_on_pixels_alone(make_picture: Callable[[int], NDArray[np.uint8]]) -> None:
    pixels = make_picture(3)
    from_file = decode(encode_png_canonical(pixels)).pixels
    assert pixel_hash(pixels) == pixel_hash(pixels.copy(order="F")) == pixel_hash(from_file)


def test_pixel_hash_has_the_documented_form() -> None:
    pixels = np.array([[[1], [258]]], dtype=np.uint16)
    expected = hashlib.sha256(b"medloop-pixels-1 uint16 1x2x1\n" + bytes([1, 0, 2, 1]))
    assert pixel_hash(pixels) == expected.hexdigest()


def test_pixel_hash_tells_shape_dtype_and_values_apart() -> None:
    variants: list[Pixels] = [
        np.zeros((2, 8, 1), np.uint8),
        np.zeros((8, 2, 1), np.uint8),
        np.zeros((2, 4, 2), np.uint8),
        np.zeros((2, 4, 1), np.uint16),
        np.ones((2, 8, 1), np.uint8),
    ]
    assert len({pixel_hash(pixels) for pixels in variants}) == len(variants)
