"""What of a file carries pixels: formats by content, and JPEG, PNG and GIF files reduced to what a decoder needs.

Reading goes through this reduction too, so that comments, profiles and thumbnails never reach a decoder, and an image
gives the same pixels with its metadata as without. Layouts follow ITU-T T.81 (JPEG), the W3C PNG specification (third
edition), GIF89a, the WebP container specification (RFC 9649) and CIPA DC-008 (EXIF).
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from medloop.errors import ImageTooLarge, InvalidImage, UnsupportedImage

ImageFormat = Literal["JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP"]

PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"

# The last entry's four wildcards are the size field of a RIFF file.
_SIGNATURES: Final[tuple[tuple[re.Pattern[bytes], ImageFormat], ...]] = (
    (re.compile(rb"\xff\xd8\xff"), "JPEG"),
    (re.compile(re.escape(PNG_SIGNATURE)), "PNG"),
    (re.compile(rb"BM"), "BMP"),
    (re.compile(rb"GIF8[79]a"), "GIF"),
    (re.compile(rb"II\x2a\x00|MM\x00\x2a|II\x2b\x00|MM\x00\x2b"), "TIFF"),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), "WEBP"),
)

# A real file has at most a few thousand parts; millions of empty ones would only cost time. A JPEG's tables cost more,
# and even an extended colour profile takes no more than some hundred segments.
_MAX_PARTS: Final = 65_536
_MAX_SEGMENTS: Final = 1_000

_PNG_PIXEL_CHUNKS: Final = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})

# A marker is FF and a code; FF00 is a stuffed byte, and RST0–RST7 belong to the scan. Fill bytes FF may precede it: no
# part of the pattern, since a long run of them would be tried from each of its bytes.
_JPEG_MARKER: Final = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
# A decoder that is fed in pieces starts anew on a run of fill bytes with each piece, so a run is cut to one of them.
_JPEG_FILL: Final = re.compile(rb"\xff{2,}")
_SOI, _EOI, _SOS, _TEM, _APP0, _APP1, _APP14 = 0xD8, 0xD9, 0xDA, 0x01, 0xE0, 0xE1, 0xEE
# SOFn, DHT, DAC (C0–CF); SOS, DQT, DNL, DRI, DHP, EXP (DA–DF).
_JPEG_PIXEL_MARKERS: Final = frozenset({*range(0xC0, 0xD0), *range(0xDA, 0xE0)})
# "JFIF" tells a decoder that the colours are YCbCr; version 1.1, no density, no thumbnail.
_PLAIN_JFIF: Final = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
_ADOBE_BYTES: Final = 12
# Each scan of a progressive JPEG is a pass over the whole image (about half a nanosecond a pixel), however few bytes it
# takes. Encoders write about ten; an image as large as is allowed may have twenty.
_MAX_SCANS: Final = 100
FULL_SCANS: Final = 20
_JPEG_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOFn

_GIF_IMAGE, _GIF_EXTENSION, _GIF_TRAILER, _GIF_CONTROL = 0x2C, 0x21, 0x3B, 0xF9

_ORIENTATION_TAG, _EXIF_SHORT = 0x0112, 3


@dataclass(frozen=True, slots=True)
class Essentials:
    """The bytes that make the pixels, and the EXIF orientation (1–8) that was written beside them."""

    data: bytes
    orientation: int


def sniff(data: bytes) -> ImageFormat:
    """The format that the first bytes announce.

    Raises:
        InvalidImage: the file is empty.
        UnsupportedImage: it is none of the formats we decode.
    """
    if not data:
        raise InvalidImage("This is an empty file: send the image itself.")
    for signature, name in _SIGNATURES:
        if signature.match(data):
            return name
    raise UnsupportedImage("This is not an image that MedLoop reads: send JPEG, PNG, BMP, GIF, TIFF or WebP.")


def jpeg_essentials(data: bytes, max_pixels: int) -> Essentials:
    """A JPEG from its first SOI to its EOI without application data and comments, the scans untouched.

    Kept of the application segments are only those that decide about colours: JFIF (rewritten without thumbnail) and
    Adobe's APP14.

    Raises:
        InvalidImage: a segment runs past the end, the end marker is missing, or there are more scans or segments than
            any encoder writes.
        ImageTooLarge: its scans together pass over more than `FULL_SCANS` images of `max_pixels`.
    """
    kept, orientation, scans, area = [b"\xff\xd8"], 1, 0, 0
    for marker, payload, scan in _jpeg_segments(data):
        if marker in _JPEG_FRAMES:
            area = int.from_bytes(payload[1:3], "big") * int.from_bytes(payload[3:5], "big")
        scans += marker == _SOS
        if scans > _MAX_SCANS:
            raise InvalidImage(f"This JPEG has more than {_MAX_SCANS} scans: save it anew as a plain JPEG.")
        if scans * area > FULL_SCANS * max_pixels:
            raise ImageTooLarge(
                f"This JPEG has {scans} scans or more, too many for its size: save it anew as a plain JPEG."
            )
        if marker in _JPEG_PIXEL_MARKERS:
            kept.append(_jpeg_segment(marker, payload) + scan)
        elif marker == _APP0 and payload.startswith(b"JFIF\x00") and len(payload) >= 14:
            kept.append(_PLAIN_JFIF)
        elif marker == _APP14 and payload.startswith(b"Adobe") and len(payload) >= _ADOBE_BYTES:
            kept.append(_jpeg_segment(marker, payload[:_ADOBE_BYTES]))
        elif marker == _APP1 and payload.startswith(b"Exif\x00\x00") and orientation == 1:
            orientation = exif_orientation(payload)
    kept.append(b"\xff\xd9")
    return Essentials(b"".join(kept), orientation)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """(marker, payload, entropy-coded bytes that follow) of each segment between SOI and EOI."""
    match = _JPEG_MARKER.search(data, 2)
    for _ in range(_MAX_SEGMENTS):
        if match is None:
            raise _truncated("JPEG")
        marker, start = match[1][0], match.end()
        if marker == _EOI:
            return
        end = start if marker in (_SOI, _TEM) else start + int.from_bytes(data[start : start + 2], "big")
        if end > len(data):
            raise _truncated("JPEG")
        match = _JPEG_MARKER.search(data, end)
        # What stands between other segments is garbage that decoders skip.
        scan = _JPEG_FILL.sub(b"\xff", data[end : match.start()]).rstrip(b"\xff") if match and marker == _SOS else b""
        yield marker, data[start + 2 : end], scan
    raise _overfull("JPEG", _MAX_SEGMENTS)


def _jpeg_segment(marker: int, payload: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


def png_essentials(data: bytes) -> Essentials:
    """A PNG with only the chunks that decide about pixels: the critical ones and tRNS, byte for byte.

    Of an animation this leaves the default image.

    Raises:
        InvalidImage: a chunk runs past the end, or IEND is missing.
    """
    kept, orientation, position = [PNG_SIGNATURE], 1, len(PNG_SIGNATURE)
    for _ in range(_MAX_PARTS):
        if position + 12 > len(data):
            raise _truncated("PNG")
        (length,) = struct.unpack_from(">I", data, position)
        kind, end = data[position + 4 : position + 8], position + 12 + length
        if end > len(data):
            raise _truncated("PNG")
        if kind in _PNG_PIXEL_CHUNKS:
            kept.append(data[position:end])
        elif kind == b"eXIf":
            orientation = exif_orientation(data[position + 8 : end - 4])
        if kind == b"IEND":
            return Essentials(b"".join(kept), orientation)
        position = end
    raise _overfull("PNG")


def gif_essentials(data: bytes) -> bytes:
    """A GIF without the comments and other extensions before its first image, but with the graphic control that makes a
    colour transparent.

    Raises:
        InvalidImage: it ends before an image begins.
    """
    try:
        start = 13 + (3 * 2 ** ((data[10] & 7) + 1) if data[10] & 0x80 else 0)
        position, control = start, b""
        for _ in range(_MAX_PARTS):
            kind = data[position]
            if kind == _GIF_IMAGE:
                return data[:start] + control + data[position:]
            if kind == _GIF_TRAILER:
                raise InvalidImage("This GIF holds no image: send one that does.")
            if kind != _GIF_EXTENSION:
                position += 1  # garbage that decoders skip
                continue
            if data[position + 1] == _GIF_CONTROL and data[position + 2] == 4:
                control = data[position : position + 7] + b"\x00"
            position = _after_sub_blocks(data, position + 2)
    except IndexError as exc:
        raise _truncated("GIF") from exc
    raise _overfull("GIF")


def _after_sub_blocks(data: bytes, position: int) -> int:
    """Where a GIF goes on behind the sub-blocks at `position`, which an empty one ends."""
    for _ in range(_MAX_PARTS):
        size = data[position]
        position += 1 + size
        if size == 0:
            return position
    raise _overfull("GIF")


def webp_size(data: bytes) -> tuple[int, int]:
    """(width, height) that a WebP announces: its decoder takes memory for the whole canvas before one can ask it.

    Raises:
        InvalidImage: its first chunk is none that begins an image.
    """
    kind, body = data[12:16], data[20:30]
    if len(body) == 10:
        if kind == b"VP8X":
            return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
        if kind == b"VP8L":
            bits = int.from_bytes(body[1:5], "little")
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        if kind == b"VP8 ":
            return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    raise InvalidImage("This WebP is damaged or truncated: send the original file again.")


def exif_orientation(exif: bytes) -> int:
    """The orientation (1–8) in an EXIF block; 1, upright, where it names none or is itself damaged."""
    tiff = exif.removeprefix(b"Exif\x00\x00")
    order = {b"II*\x00": "<", b"MM\x00*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return 1
    (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
    entries = tiff[directory + 2 :]
    declared = int.from_bytes(tiff[directory : directory + 2], "little" if order == "<" else "big")
    for index in range(min(declared, len(entries) // 12)):
        tag, kind, _, value = struct.unpack_from(f"{order}HHIH", entries, 12 * index)
        if tag == _ORIENTATION_TAG:
            return value if kind == _EXIF_SHORT and 1 <= value <= 8 else 1
    return 1


def _truncated(name: str) -> InvalidImage:
    return InvalidImage(f"This {name} is truncated: send the complete file.")


def _overfull(name: str, parts: int = _MAX_PARTS) -> InvalidImage:
    return InvalidImage(f"This {name} consists of more than {parts} parts: save it anew as a plain {name}.")
