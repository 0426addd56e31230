"""A TIFF's first page reduced to the tags that make its pixels (TIFF 6.0, and BigTIFF with its wider numbers).

A page's directory names values anywhere in the file, as often as it likes: sixty thousand tags that each claim the
whole of a 64 MiB file are 4 TB to whoever reads them. The directory is therefore written anew in its own place, with
few tags of honest size and without the pages that follow; the data and its offsets stay as they are.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from medloop.errors import InvalidImage

_TYPE_BYTES: Final = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}

# Size, samples and their format, compression, photometry, where the data lies, orientation, colour map, JPEG and LERC.
_PIXEL_TAGS: Final = frozenset(
    {256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 338, 339}
    | {347, 529, 530, 531, 532, 50_674}
)
_STRIP_OFFSETS, _TILE_OFFSETS = 273, 324
_MAX_ENTRIES: Final = 65_535  # what the 16-bit count of a classic directory can say
_MAX_PIECES: Final = 65_536  # strips or tiles: more only cost time


@dataclass(frozen=True, slots=True)
class _Layout:
    """How wide a TIFF's numbers are, as `struct` formats: of offsets, counts and values in place; of the number of
    entries; and where the first offset stands."""

    number: str
    at: int
    count: str


_CLASSIC: Final = _Layout("I", 4, "H")
_BIG: Final = _Layout("Q", 8, "Q")


def tiff_essentials(data: bytes) -> bytes:
    """The same first page with its pixels' tags alone.

    Raises:
        InvalidImage: the directory is cut off, claims more than the file has, or cuts the image into too many pieces.
    """
    order = "<" if data[:2] == b"II" else ">"
    layout = _CLASSIC if 42 in data[2:4] else _BIG
    try:
        (start,) = struct.unpack_from(order + layout.number, data, layout.at)
        entries = _entries(data, start, order, layout)
        kept = [entry for entry in entries if entry[0] in _PIXEL_TAGS and entry[1] in _TYPE_BYTES]
    except (struct.error, OverflowError, IndexError) as exc:
        raise InvalidImage("This TIFF is damaged or truncated: send the original file again.") from exc
    if sum(_TYPE_BYTES[kind] * count for _, kind, count, _ in kept) > len(data):
        raise InvalidImage("This TIFF is damaged: its tags claim more than the file has; save it anew.")
    if any(tag in (_STRIP_OFFSETS, _TILE_OFFSETS) and count > _MAX_PIECES for tag, _, count, _ in kept):
        raise InvalidImage(f"This TIFF is cut into more than {_MAX_PIECES} pieces: save it anew with larger ones.")
    packed = (struct.pack(f"{order}HH{layout.number}", *entry[:3]) + entry[3] for entry in kept)
    last_page = bytes(struct.calcsize(f"={layout.number}"))
    directory = b"".join((struct.pack(order + layout.count, len(kept)), *packed, last_page))
    return b"".join((data[:start], directory, memoryview(data)[start + len(directory) :]))


def _entries(data: bytes, start: int, order: str, layout: _Layout) -> Iterator[tuple[int, int, int, bytes]]:
    """(tag, type, count, value or offset as it stands) of the directory at `start`."""
    (count,) = struct.unpack_from(order + layout.count, data, start)
    first = start + struct.calcsize(f"={layout.count}")
    entry = struct.Struct(f"{order}HH{layout.number}{struct.calcsize('=' + layout.number)}s")
    for index in range(min(count, _MAX_ENTRIES)):
        yield entry.unpack_from(data, first + index * entry.size)
