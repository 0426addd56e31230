"""Decoded pixels on disk: every image of a data set version prepared once, read by everybody afterwards.

A cache is a folder named after the version and the preparation spec:

    images.u8     uint8 [N, S, S, C], C order, rows as in the manifest
    meta.json     both ids in full, the shape, and a CRC-32 for each block of images.u8

It is written beside its place and renamed, so a cache is whole or not there. Opening one maps the file and checks its
size, its ids and some of its blocks, in milliseconds; one that does not pass is made anew.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from medloop.data.manifest import SPLITS, Manifest, Row, Split
from medloop.data.parallel import ProgressFn, batched, ordered_map, workers_for
from medloop.errors import InvalidImage, StorageFull, StorageUnavailable
from medloop.storage.objects import ObjectStore
from medloop.vision.prepare import PreparationSpec, prepare

log = logging.getLogger(__name__)

FORMAT_VERSION: Final = 1
_BATCH: Final = 64  # images a thread takes at once
_BLOCK: Final = 2**20  # bytes that one checksum covers
_CHECKED_BLOCKS: Final = 8
_DIGITS: Final = 16  # of each id in the folder's name
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True)
class Cache:
    """The prepared images of a version: `images` uint8 [N, S, S, C], read-only and mapped, not read into memory;
    `labels` int64 [N], places in the manifest's classes. Row i is row i of the manifest."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    _indices: Mapping[Split, NDArray[np.int64]] = field(repr=False)

    def indices(self, split: Split) -> NDArray[np.int64]:
        """The rows of one split, ascending."""
        return self._indices[split]


def open_cache(
    manifest: Manifest,
    spec: PreparationSpec,
    objects: ObjectStore,
    folder: Path,
    progress: ProgressFn | None = None,
    workers: int | None = None,
) -> Cache:
    """The version prepared by `spec`, from `folder` or, the first time, from `objects`.

    Raises `StorageFull` when the disk is (nothing half-made is left there), `StorageUnavailable` when objects or the
    folder cannot be used, `NotFound` or `InvalidImage` when an image of the version is gone or damaged.
    """
    place = cache_place(manifest, spec, folder)
    expected = _expected(manifest, spec)
    with _translated(folder):
        if place.exists() and (fault := _fault(place, expected)) is not None:
            log.warning("the cache of decoded images is made anew: %s", fault, extra={"dataset_id": manifest.id})
            _discard(place)
        if not place.exists():
            _make(place, expected, manifest, spec, objects, progress, workers)
        images = np.memmap(place / "images.u8", dtype=np.uint8, mode="r", shape=tuple(expected["shape"]))
    return Cache(images, label_numbers(manifest), rows_by_split(manifest))


def cache_place(manifest: Manifest, spec: PreparationSpec, folder: Path) -> Path:
    """Where the version prepared by `spec` lies below `folder`, if it does."""
    return folder / f"{manifest.id[:_DIGITS]}-{spec.digest()[:_DIGITS]}"


def label_numbers(manifest: Manifest) -> NDArray[np.int64]:
    """The labels [N] of all rows, as places in the manifest's classes."""
    return manifest.columns.labels.astype(np.int64)


def rows_by_split(manifest: Manifest) -> dict[Split, NDArray[np.int64]]:
    """The numbers of the rows of every split, ascending."""
    return {split: manifest.columns.rows_of(split) for split in SPLITS}


def _expected(manifest: Manifest, spec: PreparationSpec) -> dict[str, Any]:
    return {
        "format": FORMAT_VERSION,
        "dataset_id": manifest.id,
        "spec": spec.digest(),
        "shape": [len(manifest.rows), spec.size, spec.size, spec.channels],
    }


def _make(
    place: Path,
    meta: Mapping[str, Any],
    manifest: Manifest,
    spec: PreparationSpec,
    objects: ObjectStore,
    progress: ProgressFn | None,
    workers: int | None,
) -> None:
    place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{place.name}.", suffix=".unfinished", dir=place.parent))
    try:
        checksums = _Checksums()
        # Written, not mapped: a full disk is an error here, and would be a crash there.
        with (unfinished / "images.u8").open("wb") as file:
            for block in prepare_rows(manifest.rows, spec, objects, progress, workers):
                file.write(block)
                checksums.update(block)
            file.flush()
            os.fsync(file.fileno())
        (unfinished / "meta.json").write_text(json.dumps({**meta, "crc32": checksums.done()}))
        _move(unfinished, place)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def prepare_rows(
    rows: Sequence[Row],
    spec: PreparationSpec,
    objects: ObjectStore,
    progress: ProgressFn | None = None,
    workers: int | None = None,
) -> Iterator[bytes]:
    """The pixels of `rows`, uint8 [N, S, S, C], in pieces and in their order.

    Raises `NotFound` or `InvalidImage` when a stored image is gone, damaged or another one.
    """

    def prepared(rows: list[Row]) -> tuple[int, bytes]:
        return len(rows), b"".join(_prepare_row(row, spec, objects) for row in rows)

    done = 0
    for count, block in ordered_map(prepared, batched(rows, _BATCH), workers=workers or workers_for(objects)):
        yield block
        done += count
        if progress:
            progress("decoding images", done, len(rows))


def _prepare_row(row: Row, spec: PreparationSpec, objects: ObjectStore) -> bytes:
    data = objects.get(row.location)
    if hashlib.sha256(data).hexdigest() != row.byte_hash:
        raise InvalidImage(
            f"The stored image {row.location} is damaged: it is not what the data set names; restore it from a backup."
        )
    try:
        return prepare(data, spec).tobytes()
    except InvalidImage as exc:
        raise type(exc)(f"The stored image {row.location} is damaged; restore it from a backup. {exc.detail}") from exc


def _move(unfinished: Path, place: Path) -> None:
    try:
        unfinished.rename(place)
    except OSError as exc:
        # Another process made the same cache meanwhile; both are equal.
        if exc.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


def _discard(place: Path) -> None:
    """Take the folder out of the way in one step first, so that nobody opens half of it."""
    grave = Path(tempfile.mkdtemp(prefix=f"{place.name}.", suffix=".unfinished", dir=place.parent))
    with suppress(FileNotFoundError):  # another process was faster
        place.rename(grave / "damaged")
    shutil.rmtree(grave, ignore_errors=True)


class _Checksums:
    """CRC-32 of each `_BLOCK` bytes of a stream."""

    def __init__(self) -> None:
        self._sums: list[int] = []
        self._rest = bytearray()

    def update(self, data: bytes) -> None:
        self._rest += data
        whole = len(self._rest) // _BLOCK * _BLOCK
        self._sums += [zlib.crc32(self._rest[start : start + _BLOCK]) for start in range(0, whole, _BLOCK)]
        del self._rest[:whole]

    def done(self) -> list[int]:
        return [*self._sums, zlib.crc32(self._rest)] if self._rest else self._sums


def _fault(place: Path, expected: Mapping[str, Any]) -> str | None:
    """What is wrong with a cache, if anything is."""
    try:
        meta = json.loads((place / "meta.json").read_text())
        size = (place / "images.u8").stat().st_size
    except (FileNotFoundError, ValueError):
        return "a file is missing or unreadable"
    checksums = meta.get("crc32") if isinstance(meta, dict) else None
    if not isinstance(checksums, list) or {**expected, "crc32": checksums} != meta:
        return "it describes other images"
    if size != int(np.prod(expected["shape"])) or len(checksums) != -(-size // _BLOCK):
        return "it has the wrong size"
    with (place / "images.u8").open("rb") as file:
        for number in sorted(set(np.linspace(0, len(checksums) - 1, _CHECKED_BLOCKS).astype(int).tolist())):
            file.seek(number * _BLOCK)
            if zlib.crc32(file.read(_BLOCK)) != checksums[number]:
                return "its content was changed"
    return None


@contextmanager
def _translated(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno in _FULL:
            raise StorageFull(
                f"The disk is full under {folder}; free some space, or name another place with MEDLOOP_HOME."
            ) from exc
        reason = exc.strerror or type(exc).__name__
        raise StorageUnavailable(f"Decoded images cannot be kept in {folder}: {reason}; check the folder.") from exc
