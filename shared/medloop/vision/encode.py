"""Pixels to bytes: PNG written by ourselves, and files freed of everything that is not pixels.

What is stored in a data set is named by the hash of its bytes, so those bytes must not depend on which build of zlib a
machine has: the canonical form uses deflate's stored blocks, which leave a compressor no choice (RFC 1950, RFC 1951).
"""

import struct
import zlib
from typing import Final

import numpy as np

from medloop.vision.containers import PNG_SIGNATURE, jpeg_essentials, png_essentials, sniff
from medloop.vision.decode import DEFAULT_LIMITS, Limits, Pixels, decode

_PNG_COLOUR_TYPES: Final = {1: 0, 2: 4, 3: 2, 4: 6}  # channels → grey, grey + alpha, RGB, RGBA
_MAX_STORED_BLOCK: Final = 65_535  # bytes: the length field of a stored block has 16 bits


def encode_png(pixels: Pixels) -> bytes:
    """A compressed PNG for people to look at; its bytes may differ between machines, its pixels do not.

    Takes uint8 [H, W] or [H, W, 1|2|3|4] (grey, grey + alpha, RGB, RGBA) or uint16 [H, W] or [H, W, 1].

    Raises:
        ValueError: another shape or dtype.
    """
    return _png(pixels, compressed=True)


def encode_png_canonical(pixels: Pixels) -> bytes:
    """An uncompressed PNG whose bytes follow from the pixels alone; takes what `encode_png` takes.

    Raises:
        ValueError: another shape or dtype.
    """
    return _png(pixels, compressed=False)


def strip_metadata(data: bytes, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """The same image without anything that could name a person: EXIF, XMP, comments, text, profiles, what follows it.

    Lossless: `decode` gives equal pixels before and after. JPEG and PNG lose their metadata and are otherwise kept byte
    for byte; where the pixels lie turned by an EXIF orientation, and for every other format, the decoded pixels are
    written as canonical PNG. Applying it twice changes nothing more.

    Raises:
        InvalidImage, UnsupportedImage, ImageTooLarge: as `decode`, as far as the file had to be read.
    """
    name = sniff(data)
    if name in ("JPEG", "PNG"):
        essentials = jpeg_essentials(data, limits.max_pixels) if name == "JPEG" else png_essentials(data)
        if essentials.orientation == 1:
            return essentials.data
    return encode_png_canonical(decode(data, limits).pixels)


def _png(pixels: Pixels, *, compressed: bool) -> bytes:
    image = pixels[..., np.newaxis] if pixels.ndim == 2 else pixels
    deep = image.dtype == np.uint16
    if image.ndim != 3 or image.size == 0 or image.shape[2] not in ((1,) if deep else _PNG_COLOUR_TYPES):
        raise ValueError(f"a PNG needs [H, W, 1–4] (16-bit: [H, W, 1]), got {pixels.dtype} {pixels.shape}")
    if not deep and image.dtype != np.uint8:
        raise ValueError(f"a PNG needs uint8 or uint16 pixels, got {pixels.dtype}")
    height, width, channels = image.shape
    rows = np.ascontiguousarray(image.astype(">u2") if deep else image).view(np.uint8).reshape(height, -1)
    filtered = np.zeros((height, rows.shape[1] + 1), dtype=np.uint8)  # each row leads with its filter type: 0, none
    filtered[:, 1:] = rows
    raw = filtered.tobytes()
    header = struct.pack(">IIBBBBB", width, height, 16 if deep else 8, _PNG_COLOUR_TYPES[channels], 0, 0, 0)
    body = zlib.compress(raw) if compressed else _stored(raw)
    return PNG_SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))


def _stored(raw: bytes) -> bytes:
    """A zlib stream (RFC 1950) of stored blocks."""
    parts = [b"\x78\x01"]
    for start in range(0, len(raw), _MAX_STORED_BLOCK):
        block = raw[start : start + _MAX_STORED_BLOCK]
        last = start + _MAX_STORED_BLOCK >= len(raw)
        parts += [struct.pack("<BHH", last, len(block), len(block) ^ 0xFFFF), block]
    parts.append(struct.pack(">I", zlib.adler32(raw)))
    return b"".join(parts)
