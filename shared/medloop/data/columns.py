"""What is asked of all rows of a data set version at once, as arrays, and rows that lie in a file instead of memory.

A million `Row` objects take half a gigabyte. `MappedRows` keeps their lines in a temporary file, which has no name and
is gone with the process, and makes a `Row` whenever one is asked for; their columns lie in another. The kernel takes
the pages of both back when it needs them.
"""

import json
import mmap
import re
import struct
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Final, NamedTuple, Self, overload

import numpy as np
from numpy.typing import NDArray

from medloop.data.row import CORRECTION, SPLITS, Row, Split, check_rows, digest, parse_row

_RECORD: Final = struct.Struct("<QQIB?")
_RECORDS: Final = np.dtype([("start", "<u8"), ("pixels", "<u8"), ("label", "<u4"), ("split", "u1"), ("corrected", "?")])
_KEY: Final = 2**64 - 1
_CORRECTION: Final = json.dumps(CORRECTION).encode()
_WORD: Final = rb'"[ !#-\[\]-~]*"'  # JSON has one way to write a text of these characters
_LINE: Final = re.compile(
    rb'\{"byte_hash":"[0-9a-f]{64}","group":%b,"label":(?P<label>%b),(?P<location>"location":%b,)'
    rb'"metadata":(?P<metadata>\{[ -~]*\}),"pixel_hash":"(?P<pixels>[0-9a-f]{64})",'
    rb'"source":(?P<source>%b),"split":(?P<split>%b)\}' % ((_WORD,) * 5)
)


@dataclass(frozen=True, slots=True)
class Columns:
    """Of N rows: `labels` uint32 [N], places in the classes; `splits` uint8 [N], places in `SPLITS`; `corrected` bool
    [N], whether a person gave the label; `pixels` uint64 [N], equal where pixel hashes are, and hardly ever where they
    are not."""

    labels: NDArray[np.uint32]
    splits: NDArray[np.uint8]
    corrected: NDArray[np.bool_]
    pixels: NDArray[np.uint64]

    @classmethod
    def of(cls, rows: Sequence[Row], classes: Sequence[str]) -> Self:
        """Of rows whose labels are among `classes`."""
        label = {name: number for number, name in enumerate(classes)}
        return cls(
            np.array([label[row.label] for row in rows], dtype=np.uint32),
            np.array([SPLITS.index(row.split) for row in rows], dtype=np.uint8),
            np.array([row.source == CORRECTION for row in rows], dtype=bool),
            np.array([_pixel_key(row.pixel_hash) for row in rows], dtype=np.uint64),
        )

    def rows_of(self, split: Split) -> NDArray[np.int64]:
        """The numbers of the rows of a split, ascending."""
        return np.flatnonzero(self.splits == SPLITS.index(split))


class MappedRows(Sequence[Row]):
    """The rows of one version, in canonical order; `id` is the one they give with `classes`, and `columns` are
    theirs."""

    def __init__(self, lines: mmap.mmap, records: NDArray[np.void], classes: tuple[str, ...], id_: str) -> None:
        self._lines = lines
        self._starts: NDArray[np.uint64] = records["start"]
        self.classes, self.id = classes, id_
        self.columns = Columns(records["label"], records["split"], records["corrected"], records["pixels"])

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int, /) -> Row: ...
    @overload
    def __getitem__(self, index: slice, /) -> tuple[Row, ...]: ...
    def __getitem__(self, index: int | slice, /) -> Row | tuple[Row, ...]:
        if isinstance(index, slice):
            return tuple(self[number] for number in range(len(self))[index])
        number = range(len(self))[index]
        end = self._starts[number + 1] if number + 1 < len(self) else len(self._lines)
        return parse_row(self._lines[self._starts[number] : end])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == another for one, another in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as a row, whose metadata has none


def map_rows(lines: Iterable[bytes], classes: tuple[str, ...], folder: Path) -> MappedRows | None:
    """Check the stored `lines` of a version and keep them in `folder`, under no name; None when they do not stand in
    canonical order, or there are none.

    Raises ValueError or TypeError for a line that is no row, `InvalidDataset` for a row that cannot be, and OSError
    when the folder cannot be used.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryFile(dir=folder) as texts, tempfile.TemporaryFile(dir=folder) as records:
        try:
            found = digest(classes, _written(lines, classes, texts, records))
        except _OutOfOrder:
            return None
        # Written, not mapped: a full disk is an error here, and would be a crash there.
        texts.flush()
        records.flush()
        if not texts.tell():
            return None  # an empty file cannot be mapped
        mapped = mmap.mmap(texts.fileno(), 0, access=mmap.ACCESS_READ)
        columns = np.memmap(records, dtype=_RECORDS, mode="r").view(np.ndarray)
        return MappedRows(mapped, columns, classes, found)


class _OutOfOrder(Exception):
    """Somebody else has written the rows; sorting them takes memory."""


def _written(lines: Iterable[bytes], classes: tuple[str, ...], texts: IO[bytes], records: IO[bytes]) -> Iterator[bytes]:
    """Write the rows and their columns; yields the canonical lines."""
    reader, start, last = _Reader(classes), 0, b""
    for line in lines:
        entry = reader.read(line.removesuffix(b"\n"))
        if entry.canonical < last:
            raise _OutOfOrder
        records.write(_RECORD.pack(start, entry.pixels, entry.label, entry.split, entry.corrected))
        start += texts.write(entry.text + b"\n")
        last = entry.canonical
        yield last


class _Entry(NamedTuple):
    """A row's line as `Row.to_json` and as `Row.canonical` have it, and its columns."""

    text: bytes
    canonical: bytes
    pixels: int
    label: int
    split: int
    corrected: bool


class _Reader:
    """Reads lines without parsing those that are written as `Row.to_json` does, which takes a fifth of the time."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        self._classes = frozenset(classes)
        self._label = _numbers(classes)
        self._split = _numbers(SPLITS)

    def read(self, line: bytes) -> _Entry:
        found = _LINE.fullmatch(line)
        if found is None or not _canonical_metadata(found["metadata"]):
            return self._parsed(line)
        label, split = self._label.get(found["label"]), self._split.get(found["split"])
        if label is None or split is None:
            return self._parsed(line)
        start, end = found.span("location")
        key, corrected = _pixel_key(found["pixels"]), found["source"] == _CORRECTION
        return _Entry(line, line[:start] + line[end:], key, label, split, corrected)

    def _parsed(self, line: bytes) -> _Entry:
        row = parse_row(line)
        check_rows([row], self._classes)
        label, split = (json.dumps(word).encode() for word in (row.label, row.split))
        return _Entry(
            row.to_json().encode(),
            row.canonical().encode(),
            _pixel_key(row.pixel_hash),
            self._label[label],
            self._split[split],
            row.source == CORRECTION,
        )


def _numbers(words: Sequence[str]) -> dict[bytes, int]:
    return {json.dumps(word).encode(): number for number, word in enumerate(words)}


@lru_cache(maxsize=1024)
def _canonical_metadata(text: bytes) -> bool:
    """Whether `text` is what `Row.canonical` makes of the metadata in it."""
    try:
        return json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"), allow_nan=False).encode() == text
    except ValueError:
        return False


def _pixel_key(pixel_hash: str | bytes) -> int:
    try:
        return int(pixel_hash[:16], 16) & _KEY
    except ValueError:
        return hash(pixel_hash) & _KEY
