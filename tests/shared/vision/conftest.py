"""Image files of every awkward kind, made here so that no test depends on a file that somebody gave us."""

import struct
import zlib
from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

HEIGHT, WIDTH = 13, 17
ORIENTATION, SOFTWARE = 0x0112, 0x0131
SECRET = "Doe^Jane"  # stands in every metadata field; must never come out again


def picture(channels: int) -> NDArray[np.uint8]:
    """[13, 17, C]: smooth enough for JPEG, the same at no two corners."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    planes = [rows * (9 + c) + columns * (3 + 2 * c) for c in range(channels)]
    return np.stack(planes, axis=-1).astype(np.uint8)


def saved(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[ORIENTATION] = orientation
    block[SOFTWARE] = SECRET
    return block.tobytes()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    """A complete PNG, written by hand, whose header promises width × height and whose pixels are missing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")


def _samples() -> dict[str, bytes]:
    grey, rgb = Image.fromarray(picture(1)[..., 0]), Image.fromarray(picture(3))
    la, rgba = Image.fromarray(picture(2)), Image.fromarray(picture(4))
    palette = rgb.quantize(16)
    deep = Image.fromarray(picture(1)[..., 0].astype(np.uint16) * 257)
    wide = Image.fromarray(picture(1)[..., 0].astype(np.int32) * 100)
    bilevel = grey.point(lambda value: 255 if value > 99 else 0, "1")
    text = PngImagePlugin.PngInfo()
    text.add_text("PatientName", SECRET)
    text.add_itxt("Comment", SECRET, zip=True)
    animation = {"save_all": True, "append_images": [Image.new("RGB", (WIDTH, HEIGHT), "red")]}
    samples = {
        "jpeg-grey": saved(grey, "JPEG"),
        "jpeg-rgb": saved(rgb, "JPEG", comment=SECRET.encode()),
        "jpeg-progressive": saved(rgb, "JPEG", progressive=True, exif=exif(1)),
        "jpeg-restarts": saved(rgb, "JPEG", restart_marker_blocks=1),
        "jpeg-cmyk": saved(rgb.convert("CMYK"), "JPEG"),
        "jpeg-rgb-kept": saved(rgb, "JPEG", keep_rgb=True),
        "jpeg-profile": saved(rgb, "JPEG", icc_profile=SECRET.encode() * 9000, xmp=SECRET.encode()),
        "jpeg-two-in-one": saved(rgb, "MPO", save_all=True, append_images=[grey.convert("RGB")], comment=SECRET),
        "jpeg-trailing": saved(grey, "JPEG") + SECRET.encode(),
        "png-grey": saved(grey, "PNG", pnginfo=text, exif=exif(1)),
        "png-bilevel": saved(bilevel, "PNG"),
        "png-bilevel-transparent": saved(bilevel, "PNG", transparency=0),
        "png-grey-transparent": saved(grey, "PNG", transparency=12),
        "png-grey-alpha": saved(la, "PNG"),
        "png-16-bit": saved(deep, "PNG", dpi=(300, 300)),
        "png-rgb": saved(rgb, "PNG", icc_profile=SECRET.encode()),
        "png-rgb-transparent": saved(rgb, "PNG", transparency=(0, 0, 0)),
        "png-rgba": saved(rgba, "PNG"),
        "png-palette": saved(palette, "PNG"),
        "png-palette-transparent": saved(palette, "PNG", transparency=bytes([0, 128, 255])),
        "png-animated": saved(rgb, "PNG", **animation),
        "png-trailing": saved(grey, "PNG") + SECRET.encode(),
        "png-one-pixel": saved(Image.new("L", (1, 1), 7), "PNG"),
        "bmp-grey": saved(grey, "BMP"),
        "bmp-rgb": saved(rgb, "BMP"),
        "bmp-bilevel": saved(bilevel, "BMP"),
        "gif": saved(palette, "GIF", comment=SECRET.encode()),
        "gif-transparent": saved(palette, "GIF", transparency=0),
        "gif-animated": saved(rgb, "GIF", **animation),
        "tiff-grey": saved(grey, "TIFF", software=SECRET),
        "tiff-16-bit": saved(deep, "TIFF"),
        "tiff-32-bit": saved(wide, "TIFF"),
        "tiff-cmyk": saved(rgb.convert("CMYK"), "TIFF"),
        "tiff-ycbcr": saved(rgb.convert("YCbCr"), "TIFF"),
        "tiff-lzw": saved(rgba, "TIFF", compression="tiff_lzw"),
        "webp": saved(rgb, "WEBP", lossless=True),
        "webp-alpha": saved(rgba, "WEBP", lossless=True, exact=True, xmp=SECRET.encode()),
        "webp-animated": saved(rgb, "WEBP", lossless=True, **animation),
    }
    for turn in range(1, 9):
        samples[f"jpeg-orientation-{turn}"] = saved(rgb, "JPEG", exif=exif(turn))
        samples[f"png-orientation-{turn}"] = saved(deep, "PNG", exif=exif(turn))
        samples[f"webp-orientation-{turn}"] = saved(rgb, "WEBP", lossless=True, exif=exif(turn))
        samples[f"tiff-orientation-{turn}"] = saved(grey, "TIFF", tiffinfo={ORIENTATION: turn})
    return samples


SAMPLES = _samples()


@pytest.fixture(params=SAMPLES)
def sample(request: pytest.FixtureRequest) -> bytes:
    """Each awkward file in turn."""
    return SAMPLES[request.param]


@pytest.fixture
def samples() -> dict[str, bytes]:
    return SAMPLES


@pytest.fixture
def make_picture() -> Callable[[int], NDArray[np.uint8]]:
    return picture


@pytest.fixture
def save() -> Callable[..., bytes]:
    return saved


@pytest.fixture
def make_png_header() -> Callable[[int, int], bytes]:
    return png_header


@pytest.fixture
def secret() -> bytes:
    return SECRET.encode()
