"""Bytes to pixels, safely: format by content, size by header before any pixel is decoded, errors only of our own.

ICC profiles and gamma are not applied: a network sees the numbers that the file holds.
"""

import hashlib
from dataclasses import dataclass
from io import BytesIO
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from medloop.errors import ImageTooLarge, InvalidImage, MedLoopError, UnsupportedImage
from medloop.vision.containers import (
    Essentials,
    ImageFormat,
    exif_orientation,
    gif_essentials,
    jpeg_essentials,
    png_essentials,
    sniff,
    webp_size,
)
from medloop.vision.tiff import tiff_essentials

Pixels = NDArray[np.uint8] | NDArray[np.uint16]

# The reader classes are called directly: `Image.open` first holds the size against PIL's own, process-wide limit and
# warns about what our limit is there to refuse.
_READERS: Final[dict[ImageFormat, type[ImageFile]]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "BMP": BmpImageFile,
    "GIF": GifImageFile,
    "TIFF": TiffImageFile,
    "WEBP": WebPImageFile,
}

_GREY_MODES: Final = frozenset({"1", "L", "LA", "La"})
_COLOUR_MODES: Final = frozenset({"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"})
_DEEP_MODES: Final = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})


# Run lengths of BMP are expanded in Python: their bytes or pixels cost as much time as this many pixels of other files.
_RLE_COST: Final = 20


@dataclass(frozen=True, slots=True)
class Limits:
    """How large an image may be before it is refused: bytes of the file, pixels (width × height), pixels a side."""

    max_bytes: int = 64 * 2**20
    max_pixels: int = 50_000_000
    max_side: int = 20_000


DEFAULT_LIMITS: Final = Limits()


@dataclass(frozen=True, slots=True)
class Header:
    """What a file announces about itself; width and height in pixels as stored, before any EXIF rotation."""

    width: int
    height: int
    format: ImageFormat


@dataclass(frozen=True, slots=True)
class Decoded:
    """An upright image.

    `pixels` is [H, W, C], contiguous: uint8 with C = 1 grey, 2 grey + alpha, 3 RGB, 4 RGB + alpha, or uint16 with
    C = 1. Alpha is straight (not premultiplied).
    """

    pixels: Pixels
    format: ImageFormat


def read_header(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Header:
    """Size and format of an image within `limits`, without decoding a pixel.

    Raises:
        InvalidImage: empty, truncated or damaged.
        UnsupportedImage: not a format we decode.
        ImageTooLarge: beyond `limits`.
    """
    name = _sniff_within(data, limits)
    try:
        with _open(_essentials(data, name, limits).data, name, limits) as image:
            return Header(image.width, image.height, name)
    except MedLoopError:
        raise
    except Exception as exc:
        raise _translated(exc, name) from exc


def decode(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Decoded:
    """The pixels of a JPEG, PNG, BMP, GIF (first frame), TIFF (first page) or WebP (first frame).

    EXIF orientation is applied, palettes are expanded, transparency of any kind becomes an alpha channel, 1-bit becomes
    grey, CMYK and YCbCr become RGB. Grey of 16 bits, and of 32 bits where every value fits in 16, stays uint16; colour
    of 16 bits a channel is reduced to its high byte (PIL has no such mode).

    The time it takes follows `limits.max_pixels` too: what unpacks slowly for its size counts as larger than it is.

    Raises:
        InvalidImage: empty, truncated or damaged.
        UnsupportedImage: not a format, or a kind of pixels (floating point, CIELAB, beyond 16 bits), that we decode.
        ImageTooLarge: beyond `limits`; known from the header, before pixels take memory.
    """
    name = _sniff_within(data, limits)
    # Whatever a decoder trips over is the file's fault, and decoders raise nearly every class of exception there is.
    try:
        essentials = _essentials(data, name, limits)
        with _open(essentials.data, name, limits) as image:
            image.load()
            orientation = exif_orientation(image.info.get("exif", b"")) if name == "WEBP" else essentials.orientation
            return Decoded(_upright(_to_array(image), orientation), name)
    except MedLoopError:
        raise
    except Exception as exc:
        raise _translated(exc, name) from exc


def pixel_hash(pixels: Pixels) -> str:
    """SHA-256 (hex) of an image's pixels, the same on every machine and whatever file they came from.

    Hashed is `medloop-pixels-1 <dtype> <H>x<W>x<C>` and a newline in ASCII, dtype being `uint8` or `uint16`, then the
    values in C order (row, column, channel), 16-bit ones little-endian.
    """
    little_endian = np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("<"))
    shape = "x".join(map(str, pixels.shape))
    digest = hashlib.sha256(f"medloop-pixels-1 {pixels.dtype.name} {shape}\n".encode("ascii"))
    digest.update(little_endian.data)
    return digest.hexdigest()


def _sniff_within(data: bytes, limits: Limits) -> ImageFormat:
    if len(data) > limits.max_bytes:
        raise ImageTooLarge(
            f"The image file has {len(data):,} bytes, more than the {limits.max_bytes:,} allowed: send a smaller one."
        )
    return sniff(data)


def _essentials(data: bytes, name: ImageFormat, limits: Limits) -> Essentials:
    if name == "JPEG":
        return jpeg_essentials(data, limits.max_pixels)
    if name == "PNG":
        return png_essentials(data)
    # PIL itself turns TIFF pages upright; WebP's orientation is read where its container is parsed.
    if name == "TIFF":
        return Essentials(tiff_essentials(data, limits.max_pixels), 1)
    return Essentials(gif_essentials(data) if name == "GIF" else data, 1)


def _open(data: bytes, name: ImageFormat, limits: Limits) -> ImageFile:
    if name == "WEBP":
        _check_size(*webp_size(data), name, limits)
    image = _READERS[name](BytesIO(data))
    _check_size(*image.size, name, limits)
    cost = _RLE_COST * max(len(data), image.width * image.height)
    if image.tile and image.tile[0][0] == "bmp_rle" and cost > limits.max_pixels:
        raise ImageTooLarge("This BMP is run-length encoded and too large to be read so: save it as PNG.")
    return image


def _check_size(width: int, height: int, name: ImageFormat, limits: Limits) -> None:
    if min(width, height) < 1:
        raise InvalidImage(f"This {name} has no pixels: send an image that has some.")
    if max(width, height) > limits.max_side or width * height > limits.max_pixels:
        raise ImageTooLarge(
            f"The image has {width:,}×{height:,} pixels; allowed are {limits.max_pixels:,} in all and "
            f"{limits.max_side:,} a side: send a smaller one."
        )


def _translated(exc: Exception, name: ImageFormat) -> InvalidImage:
    if isinstance(exc, (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError)):
        return ImageTooLarge(f"This {name} unpacks to more than memory allows: send a smaller image.")
    return InvalidImage(f"This {name} is damaged or truncated: send the original file again.")


def _to_array(image: ImageFile) -> Pixels:
    """[H, W, C] of a loaded image, in one of the layouts that `Decoded` names."""
    if image.mode in _DEEP_MODES:
        return _deep_grey(np.asarray(image))
    if image.mode in _GREY_MODES:
        mode = "LA" if image.has_transparency_data else "L"
    elif image.mode in _COLOUR_MODES:
        mode = "RGBA" if image.has_transparency_data else "RGB"
    else:
        raise UnsupportedImage(f"Images of mode {image.mode} are not read: save it as 8- or 16-bit grey, RGB or RGBA.")
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels[..., np.newaxis] if pixels.ndim == 2 else pixels


def _deep_grey(values: NDArray[np.integer]) -> NDArray[np.uint16]:
    if values.dtype.itemsize > 2 and (values.min() < 0 or values.max() > 65_535):
        raise UnsupportedImage("The image has grey values outside 0–65535: save it as 16-bit unsigned grey.")
    return values.astype(np.uint16)[..., np.newaxis]


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undo an EXIF orientation (CIPA DC-008, tag 0x0112): 1 upright, 2–4 mirrored or upside down, 5–8 lying."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    mirrored_columns = orientation in (2, 3, 6, 7)
    mirrored_rows = orientation in (3, 4, 7, 8)
    pixels = pixels[:: -1 if mirrored_rows else 1, :: -1 if mirrored_columns else 1]
    return pixels.copy(order="C") if not pixels.flags.c_contiguous else pixels
