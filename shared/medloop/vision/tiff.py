"""A TIFF's first page reduced to the tags that make its pixels (TIFF 6.0, and BigTIFF with its wider numbers).

A page's directory names values anywhere in the file, as often as it likes: sixty thousand tags that each claim the
whole of a 64 MiB file are 4 TB to whoever reads them. The directory is therefore written anew in its own place, with
few tags of honest size and without the pages that follow; the data and its offsets stay as they are.

Two things in a page may be larger than the page: its tiles, each of which is unpacked whole, and JPEG images in its
strips and tiles, which may have as many passes as they like. Both count for the limits.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from medloop.errors import ImageTooLarge, InvalidImage
from medloop.vision.containers import FULL_SCANS

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
_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT, _COMPRESSION = 256, 257, 322, 323, 259
_STRIP_OFFSETS, _STRIP_BYTES, _TILE_OFFSETS, _TILE_BYTES = 273, 279, 324, 325
_NUMBERS: Final = {1: "B", 3: "H", 4: "I", 16: "Q"}  # unsigned types, as `struct` formats
_JPEG: Final = frozenset({6, 7})
_START_OF_SCAN: Final = b"\xff\xda"
# libtiff (4.7) refuses a JPEG of several passes that needs more than 100 MiB of coefficients, two bytes each.
_JPEG_PIXELS: Final = 50_000_000
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


@dataclass(frozen=True, slots=True)
class _Page:
    """A directory's entries by tag: (tag, type, count, value or offset as it stands)."""

    data: bytes
    order: str
    layout: _Layout
    entries: dict[int, tuple[int, int, int, bytes]] = field(default_factory=dict)

    def numbers(self, tag: int) -> tuple[int, ...]:
        """The values of a tag that holds unsigned numbers; none where it is missing."""
        if tag not in self.entries:
            return ()
        _, kind, count, value = self.entries[tag]
        if kind not in _NUMBERS or count > _MAX_PIECES:
            raise _damaged()
        values = struct.Struct(f"{self.order}{count}{_NUMBERS[kind]}")
        if values.size <= len(value):
            return values.unpack_from(value)
        (start,) = struct.unpack(self.order + self.layout.number, value)
        if start + values.size > len(self.data):
            raise _damaged()
        return values.unpack_from(self.data, start)

    def number(self, tag: int) -> int:
        """The value of a tag that holds one positive number."""
        numbers = self.numbers(tag)
        if len(numbers) != 1 or numbers[0] < 1:
            raise _damaged()
        return numbers[0]


def tiff_essentials(data: bytes, max_pixels: int) -> bytes:
    """The same first page with its pixels' tags alone, each of them once.

    Raises:
        InvalidImage: the directory is cut off, claims more than the file has, or cuts the image into too many pieces.
        ImageTooLarge: its tiles have more than `max_pixels`, or JPEG images in it have too many scans.
    """
    order = "<" if data[:2] == b"II" else ">"
    layout = _CLASSIC if 42 in data[2:4] else _BIG
    try:
        (start,) = struct.unpack_from(order + layout.number, data, layout.at)
        page = _Page(data, order, layout)
        for entry in _entries(data, start, order, layout):
            if entry[0] in _PIXEL_TAGS and entry[1] in _TYPE_BYTES:
                page.entries.setdefault(entry[0], entry)  # of a tag that comes twice, readers differ in which they take
    except (struct.error, OverflowError, IndexError) as exc:
        raise _damaged() from exc
    kept = list(page.entries.values())
    if sum(_TYPE_BYTES[kind] * count for _, kind, count, _ in kept) > len(data):
        raise InvalidImage("This TIFF is damaged: its tags claim more than the file has; save it anew.")
    if any(tag in (_STRIP_OFFSETS, _TILE_OFFSETS) and count > _MAX_PIECES for tag, _, count, _ in kept):
        raise InvalidImage(f"This TIFF is cut into more than {_MAX_PIECES} pieces: save it anew with larger ones.")
    _check_tiles(page, max_pixels)
    if not _JPEG.isdisjoint(page.numbers(_COMPRESSION)):
        _check_scans(page, max_pixels)
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


def _check_tiles(page: _Page, max_pixels: int) -> None:
    """Tiles may reach beyond the image's edge, and are unpacked as they are."""
    if not page.entries.keys() & {_TILE_WIDTH, _TILE_HEIGHT}:
        return
    pixels = 1
    for side, tile in ((_WIDTH, _TILE_WIDTH), (_HEIGHT, _TILE_HEIGHT)):
        pixels *= -(-page.number(side) // page.number(tile)) * page.number(tile)
    if pixels > max_pixels:
        raise ImageTooLarge(
            f"The tiles of this TIFF have {pixels:,} pixels; allowed are {max_pixels:,}: send a smaller image."
        )


def _check_scans(page: _Page, max_pixels: int) -> None:
    """JPEG in a TIFF hardly ever has more than one scan a piece; one that does may be larger than the page says."""
    scans, left = 0, len(page.data)
    for offsets, sizes in ((_STRIP_OFFSETS, _STRIP_BYTES), (_TILE_OFFSETS, _TILE_BYTES)):
        starts, lengths = page.numbers(offsets), page.numbers(sizes)
        if len(starts) != len(lengths):
            raise _damaged()
        for start, length in zip(starts, lengths, strict=True):
            size = length or (len(page.data) if start else 0)  # as libtiff reads one that is said to have no bytes
            left -= size
            if left < 0:  # pieces that overlap would be searched over and over
                raise _damaged()
            scans = max(scans, page.data.count(_START_OF_SCAN, start, start + size))
    if scans > 1 and scans * _JPEG_PIXELS > FULL_SCANS * max_pixels:
        raise ImageTooLarge(f"This TIFF holds JPEG of {scans} scans, too many to be read so: save it as PNG.")


def _damaged() -> InvalidImage:
    return InvalidImage("This TIFF is damaged or truncated: send the original file again.")
