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
import hashlib
import io
import json
import math
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, get_args

from medloop.errors import InvalidDataset, InvalidRequest, NotFound
from medloop.storage.objects import ObjectStore

Split = Literal["train", "val", "calibration", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

Scalar = str | int | float | bool | None

CORRECTION = "correction"
"""The `source` of a row whose label a person gave to an image that a model had been asked about."""

FORMAT_VERSION = 1
_SHARDS = 256
_REPEATED = frozenset({"label", "split", "group", "source"})
_HASH = re.compile(r"[0-9a-f]{64}")  # SHA-256


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled image.

    `byte_hash` is the SHA-256 of the stored bytes and `pixel_hash` that of the decoded pixels, both in hex; `group`
    ("" = none) is the patient, scan or smear that must stay in one split; `source` says in a word where the image came
    from; `location` is the object key of the bytes and no part of the data set's id.
    """

    byte_hash: str
    pixel_hash: str
    label: str
    split: Split
    group: str = ""
    source: str = ""
    metadata: Mapping[str, Scalar] = field(default_factory=dict)
    location: str = ""

    def canonical(self) -> str:
        """The row as one line of JSON with sorted keys and without its location: what the id is made of."""
        return json.dumps(self._content(), sort_keys=True, separators=(",", ":"), allow_nan=False)

    def to_json(self) -> str:
        return json.dumps(
            {**self._content(), "location": self.location}, sort_keys=True, separators=(",", ":"), allow_nan=False
        )

    def _content(self) -> dict[str, Any]:
        return {
            "byte_hash": self.byte_hash,
            "group": self.group,
            "label": self.label,
            "metadata": dict(self.metadata),
            "pixel_hash": self.pixel_hash,
            "source": self.source,
            "split": self.split,
        }


@dataclass(frozen=True)
class Manifest:
    """A data set version: `rows` in canonical order, whatever order they were given in.

    `name` is the lineage and `parent` the version before; neither is part of the id. Raises `InvalidDataset` when a row
    names an unknown class or split, or a metadata value that JSON has no word for.
    """

    name: str
    classes: tuple[str, ...]
    rows: tuple[Row, ...]
    parent: str | None = None
    id: str = field(init=False)
    """The Merkle digest of classes and rows, 64 hex digits."""

    def __post_init__(self) -> None:
        if len(set(self.classes)) != len(self.classes):
            raise InvalidDataset(f"The class names of {self.name} repeat themselves; give every class its own name.")
        _check_rows(self.rows, frozenset(self.classes))
        lines = [row.canonical() for row in self.rows]
        # byte_hash is the first key of a line, so sorting lines sorts shards too.
        order = sorted(range(len(lines)), key=lines.__getitem__)
        object.__setattr__(self, "rows", tuple(self.rows[i] for i in order))
        pairs = ((self.rows[place].byte_hash, lines[i]) for place, i in enumerate(order))
        object.__setattr__(self, "id", _digest(self.classes, pairs))

    def of(self, split: Split) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.split == split)

    def counts(self) -> dict[Split, dict[str, int]]:
        """Images by split and class; every split and class is there, also with 0."""
        table: dict[Split, dict[str, int]] = {split: dict.fromkeys(self.classes, 0) for split in SPLITS}
        for row in self.rows:
            table[row.split][row.label] += 1
        return table

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


def load_manifest(objects: ObjectStore, dataset_id: str, *, name: str | None = None) -> Manifest:
    """Read a version back and verify that its rows still give its id.

    The same data may stand in several lineages: `name` says under which it is wanted (default: where it was first
    saved). Raises `NotFound` for an unknown id or a lineage without it, `InvalidDataset` for a damaged manifest.
    """
    rows = tuple(iter_rows(objects, dataset_id))
    summary = _read_summary(objects, dataset_id)
    parent: str | None = summary["parent"]
    if name is not None and name != summary["name"]:
        parent = _parent_in(objects, name, dataset_id)
    manifest = Manifest(name or summary["name"], tuple(summary["classes"]), rows, parent)
    if manifest.id != dataset_id:
        raise _damaged(dataset_id)
    return manifest


def iter_rows(objects: ObjectStore, dataset_id: str) -> Iterator[Row]:
    """The rows of a stored version one after another, in canonical order, without holding them all.

    Verifies nothing but each row's form; `load_manifest` recomputes the id.
    """
    packed = objects.get(_rows_key(_checked_id(dataset_id)))
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as lines:
            for line in lines:
                yield _parse_row(line)
    except (OSError, EOFError, zlib.error, ValueError, TypeError) as exc:
        raise _damaged(dataset_id) from exc


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


def _parse_row(line: bytes) -> Row:
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise ValueError("the row is no object")
    # Rows by the million share few words, of which each is kept once.
    row = Row(**fields | {name: sys.intern(fields[name]) for name in _REPEATED & fields.keys()})
    texts = (row.byte_hash, row.pixel_hash, row.label, row.split, row.group, row.source, row.location)
    if not all(isinstance(text, str) for text in texts) or not isinstance(row.metadata, dict):
        raise ValueError("a field of the row has the wrong type")
    return row


def _check_rows(rows: Iterable[Row], classes: frozenset[str]) -> None:
    for row in rows:
        if not _HASH.fullmatch(row.byte_hash):
            raise InvalidDataset(f"An image's byte hash is {row.byte_hash!r}, which is no SHA-256 in hex.")
        if row.label not in classes:
            raise InvalidDataset(f"An image is labelled {row.label!r}, which is none of the data set's classes.")
        if row.split not in SPLITS:
            raise InvalidDataset(f"An image stands in split {row.split!r}; splits are {', '.join(SPLITS)}.")
        if any(isinstance(value, float) and not math.isfinite(value) for value in row.metadata.values()):
            raise InvalidDataset("A metadata column holds NaN or infinity; leave such values empty.")


def _digest(classes: tuple[str, ...], lines: Iterable[tuple[str, str]]) -> str:
    """`lines`: (byte hash, canonical line) pairs in canonical order."""
    shards = [hashlib.sha256(b"").hexdigest()] * _SHARDS
    for prefix, shard in groupby(lines, key=lambda pair: pair[0][:2]):
        digest = hashlib.sha256()
        for _, line in shard:
            digest.update(line.encode() + b"\n")
        shards[int(prefix, 16)] = digest.hexdigest()
    root = {"format": FORMAT_VERSION, "classes": list(classes), "shards": shards}
    return hashlib.sha256(json.dumps(root, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


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
    if not _HASH.fullmatch(dataset_id):
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
