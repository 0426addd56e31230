"""One labelled image of a data set version, and the line of JSON that it is stored and digested as."""

import hashlib
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Final, Literal, get_args

from medloop.errors import InvalidDataset

Split = Literal["train", "val", "calibration", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

Scalar = str | int | float | bool | None

CORRECTION = "correction"
"""The `source` of a row whose label a person gave to an image that a model had been asked about."""

FORMAT_VERSION = 1
HASH = re.compile(r"[0-9a-f]{64}")  # SHA-256
_SHARDS = 256
_REPEATED = frozenset({"label", "split", "group", "source"})
_PREFIX: Final = slice(len('{"byte_hash":"'), len('{"byte_hash":"') + 2)  # of a canonical line


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


def parse_row(line: bytes) -> Row:
    """The row that `to_json` gave `line`; raises ValueError or TypeError for anything else."""
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise ValueError("the row is no object")
    # Rows by the million share few words, of which each is kept once.
    row = Row(**fields | {name: sys.intern(fields[name]) for name in _REPEATED & fields.keys()})
    texts = (row.byte_hash, row.pixel_hash, row.label, row.split, row.group, row.source, row.location)
    if not all(isinstance(text, str) for text in texts) or not isinstance(row.metadata, dict):
        raise ValueError("a field of the row has the wrong type")
    return row


def check_rows(rows: Iterable[Row], classes: frozenset[str]) -> None:
    """Raise `InvalidDataset` for a row that no version of a data set with these classes can have."""
    for row in rows:
        if not HASH.fullmatch(row.byte_hash):
            raise InvalidDataset(f"An image's byte hash is {row.byte_hash!r}, which is no SHA-256 in hex.")
        if row.label not in classes:
            raise InvalidDataset(f"An image is labelled {row.label!r}, which is none of the data set's classes.")
        if row.split not in SPLITS:
            raise InvalidDataset(f"An image stands in split {row.split!r}; splits are {', '.join(SPLITS)}.")
        if any(isinstance(value, float) and not math.isfinite(value) for value in row.metadata.values()):
            raise InvalidDataset("A metadata column holds NaN or infinity; leave such values empty.")


def digest(classes: tuple[str, ...], lines: Iterable[bytes]) -> str:
    """The id of the version that has these classes and rows: `lines` are canonical, in canonical order."""
    shards = [hashlib.sha256(b"").hexdigest()] * _SHARDS
    # byte_hash is the first key of a line.
    for prefix, shard in groupby(lines, key=lambda line: line[_PREFIX]):
        found = hashlib.sha256()
        for line in shard:
            found.update(line + b"\n")
        shards[int(prefix, 16)] = found.hexdigest()
    root = {"format": FORMAT_VERSION, "classes": list(classes), "shards": shards}
    return hashlib.sha256(json.dumps(root, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
