"""What a data set version is: one immutable list of labelled images, named by a digest of its own content.

The id is a two-level Merkle digest (Merkle 1987). Every row is one line of canonical JSON **without** its location;
lines are put into 256 shards by the first byte of the image's hash and sorted, each shard is hashed (SHA-256), and the
id is the SHA-256 of the shard digests together with the class names and the format's version. So the same data
elsewhere, in another order or under another lineage's name is the same version, and one changed row changes one shard.

Rows are a multiset: an image that stands twice in the source stands twice here. A manifest keeps its rows in the
canonical order, so that row numbers mean the same image everywhere.

Objects that one version owns, none of which is ever changed (leaks.json comes from `medloop.data.build`):

    datasets/<id>/manifest.jsonl.gz     one row a line, canonical order, with locations
    datasets/<id>/dataset.json          name, classes, counts, parent, schema version
    lineages/<name>/<sequence>.json     the versions of a lineage, oldest first
"""

import gzip
import io
import json
import logging
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from medloop.data.columns import Columns, MappedRows, map_rows
from medloop.data.row import (
    CORRECTION,
    FORMAT_VERSION,
    HASH,
    SPLITS,
    Row,
    Scalar,
    Split,
    check_rows,
    digest,
    parse_row,
)
from medloop.errors import InvalidDataset, InvalidRequest, NotFound
from medloop.storage.objects import ObjectStore

__all__ = [
    "CORRECTION",
    "SPLITS",
    "Manifest",
    "Row",
    "Scalar",
    "Split",
    "dataset_key",
    "iter_rows",
    "latest_version",
    "lineage",
    "load_manifest",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Manifest:
    """A data set version: `rows` in canonical order, whatever order they were given in; a tuple, or `MappedRows`.

    `name` is the lineage and `parent` the version before; neither is part of the id. Raises `InvalidDataset` when a row
    names an unknown class or split, or a metadata value that JSON has no word for.
    """

    name: str
    classes: tuple[str, ...]
    rows: Sequence[Row]
    parent: str | None = None
    id: str = field(init=False)
    """The Merkle digest of classes and rows, 64 hex digits."""

    def __post_init__(self) -> None:
        if len(set(self.classes)) != len(self.classes):
            raise InvalidDataset(f"The class names of {self.name} repeat themselves; give every class its own name.")
        if isinstance(self.rows, MappedRows) and self.rows.classes == self.classes:
            object.__setattr__(self, "id", self.rows.id)
            return
        check_rows(self.rows, frozenset(self.classes))
        lines = [row.canonical() for row in self.rows]
        # byte_hash is the first key of a line, so sorting lines sorts shards too.
        order = sorted(range(len(lines)), key=lines.__getitem__)
        object.__setattr__(self, "rows", tuple(self.rows[i] for i in order))
        object.__setattr__(self, "id", digest(self.classes, (lines[i].encode() for i in order)))

    @cached_property
    def columns(self) -> Columns:
        """What is asked of all rows at once, without going through them."""
        return self.rows.columns if isinstance(self.rows, MappedRows) else Columns.of(self.rows, self.classes)

    def of(self, split: Split) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.split == split)

    def counts(self) -> dict[Split, dict[str, int]]:
        """Images by split and class; every split and class is there, also with 0."""
        labels, splits, width = self.columns.labels, self.columns.splits, len(self.classes)
        table = np.bincount(splits * np.int64(width) + labels, minlength=len(SPLITS) * width)
        by_split = table.reshape(len(SPLITS), width).tolist()
        return {split: dict(zip(self.classes, row, strict=True)) for split, row in zip(SPLITS, by_split, strict=True)}

    def summary(self) -> dict[str, Any]:
        """What dataset.json holds."""
        return {
            "schema_version": FORMAT_VERSION,
            "id": self.id,
            "name": self.name,
            "classes": list(self.classes),
            "images": len(self.rows),
            "counts": self.counts(),
            "parent": self.parent,
        }

    def save(self, objects: ObjectStore) -> None:
        """Store this version and enter it into its lineage; what is already there stays as it is."""
        objects.put_if_absent(_rows_key(self.id), _pack(self.rows))
        objects.put_if_absent(_summary_key(self.id), json.dumps(self.summary(), indent=1).encode())
        _enter_lineage(objects, self.name, self.id, self.parent)


def load_manifest(
    objects: ObjectStore, dataset_id: str, *, name: str | None = None, folder: Path | None = None
) -> Manifest:
    """Read a version back and verify that its rows still give its id.

    The same data may stand in several lineages: `name` says under which it is wanted (default: where it was first
    saved). With a `folder` the rows are kept in nameless files there instead of memory, as long as it has room for them
    (about 300 bytes a row). Raises `NotFound` for an unknown id or a lineage without it, `InvalidDataset` for a damaged
    manifest.
    """
    packed = objects.get(_rows_key(_checked_id(dataset_id)))
    summary = _read_summary(objects, dataset_id)
    classes = tuple(summary["classes"])
    mapped = None if folder is None else _mapped(packed, dataset_id, classes, folder)
    rows = tuple(_parsed(packed, dataset_id)) if mapped is None else mapped
    del packed  # which is as large as a third of the rows
    parent: str | None = summary["parent"]
    if name is not None and name != summary["name"]:
        parent = _parent_in(objects, name, dataset_id)
    manifest = Manifest(name or summary["name"], classes, rows, parent)
    if manifest.id != dataset_id:
        raise _damaged(dataset_id)
    return manifest


def iter_rows(objects: ObjectStore, dataset_id: str) -> Iterator[Row]:
    """The rows of a stored version one after another, in canonical order, without holding them all.

    Verifies nothing but each row's form; `load_manifest` recomputes the id.
    """
    yield from _parsed(objects.get(_rows_key(_checked_id(dataset_id))), dataset_id)


def lineage(objects: ObjectStore, name: str) -> tuple[str, ...]:
    """The ids of all versions of a lineage, oldest first; empty when there is no such lineage."""
    return tuple(str(entry["id"]) for entry in _lineage_entries(objects, name))


def latest_version(objects: ObjectStore, name: str) -> str | None:
    """The id of the newest version of a lineage, or None when there is no such lineage."""
    keys = list(objects.list(_lineage_prefix(name)))
    return str(json.loads(objects.get(keys[-1]))["id"]) if keys else None


def dataset_key(dataset_id: str, file: str) -> str:
    """The object key of a file that belongs to one version."""
    return f"datasets/{_checked_id(dataset_id)}/{file}"


def _parsed(packed: bytes, dataset_id: str) -> Iterator[Row]:
    try:
        yield from map(parse_row, _lines(packed))
    except (OSError, EOFError, zlib.error, ValueError, TypeError) as exc:
        raise _damaged(dataset_id) from exc


def _mapped(packed: bytes, dataset_id: str, classes: tuple[str, ...], folder: Path) -> MappedRows | None:
    """None when that cannot be."""
    try:
        return map_rows(_lines(packed), classes, folder)
    except (EOFError, zlib.error, gzip.BadGzipFile, ValueError, TypeError) as exc:
        raise _damaged(dataset_id) from exc
    except OSError as exc:
        log.warning("the rows of the data set are held in memory, and not in %s: %s", folder, exc)
        return None


def _lines(packed: bytes) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=io.BytesIO(packed)) as lines:
        yield from lines


def _pack(rows: Iterable[Row]) -> bytes:
    packed = io.BytesIO()
    # No time and no file name inside: the same rows always give the same bytes.
    with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as lines:
        for row in rows:
            lines.write(row.to_json().encode() + b"\n")
    return packed.getvalue()


def _rows_key(dataset_id: str) -> str:
    return dataset_key(dataset_id, "manifest.jsonl.gz")


def _summary_key(dataset_id: str) -> str:
    return dataset_key(dataset_id, "dataset.json")


def _lineage_prefix(name: str) -> str:
    return f"lineages/{name}/"


def _checked_id(dataset_id: str) -> str:
    if not HASH.fullmatch(dataset_id):
        raise InvalidRequest("A data set id is 64 hexadecimal digits; `medloop dataset show` prints it.")
    return dataset_id


def _read_summary(objects: ObjectStore, dataset_id: str) -> dict[str, Any]:
    try:
        summary: dict[str, Any] = json.loads(objects.get(_summary_key(dataset_id)))
    except ValueError as exc:
        raise _damaged(dataset_id) from exc
    if not {"name", "classes", "parent"} <= summary.keys():
        raise _damaged(dataset_id)
    return summary


def _lineage_entries(objects: ObjectStore, name: str) -> list[dict[str, Any]]:
    return [json.loads(objects.get(key)) for key in objects.list(_lineage_prefix(name))]


def _enter_lineage(objects: ObjectStore, name: str, dataset_id: str, parent: str | None) -> None:
    """Append to the lineage unless it has this version; two writers at once get two sequence numbers."""
    while dataset_id not in (known := lineage(objects, name)):
        entry = {"schema_version": FORMAT_VERSION, "id": dataset_id, "parent": parent}
        if objects.put_if_absent(f"{_lineage_prefix(name)}{len(known):08d}.json", json.dumps(entry).encode()):
            return


def _parent_in(objects: ObjectStore, name: str, dataset_id: str) -> str | None:
    for entry in _lineage_entries(objects, name):
        if entry["id"] == dataset_id:
            parent: str | None = entry["parent"]
            return parent
    raise NotFound(f"Data set {name} has no version {dataset_id[:16]}; `medloop dataset show {name}` lists them.")


def _damaged(dataset_id: str) -> InvalidDataset:
    return InvalidDataset(
        f"The stored manifest of data set {dataset_id[:16]} is damaged or was changed: its rows do not give its id. "
        "Restore it from a backup, or build the data set again into an empty object store."
    )
