"""Records: small JSON documents by kind and id, in a SQLite file or a MongoDB-compatible server.

Few verbs and no query language: a record is put once, read, found by the fields its kind declares, counted, and
changed only by whoever has seen its present revision. There are no transactions and no change streams, so that any
server that speaks MongoDB's protocol will do. Ids are UUIDv7, so their order is the order of time. One contract suite
(`tests/contract/test_records.py`) runs on both implementations.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic_core import from_json

from medloop.errors import InvalidRequest

FIELDS: dict[str, dict[str, str]] = {
    "predictions": {"model": "model.name", "version": "model.version", "label": "label", "image_hash": "image_hash"},
    "corrections": {
        "status": "status",
        "model": "model",
        "version": "version",
        "prediction_id": "prediction_id",
        "image_hash": "image_hash",
        "label": "label",
    },
    "jobs": {"type": "type", "status": "status", "key": "key"},
    "job_keys": {},
    "gate_decisions": {"model": "model", "version": "challenger", "outcome": "outcome"},
    "approvals": {"model": "model", "version": "version", "action": "action"},
    "disagreements": {"model": "model", "version": "challenger"},
    "engine_checks": {"model": "model", "version": "version"},
    "api_keys": {"name": "name", "status": "status"},
    "audit": {"type": "type", "model": "model", "actor": "actor"},
    "pipelines": {"model": "model", "status": "status"},
}
"""For each kind the fields that records are found by, and where in the document each stands. Their values are strings
or null; a field that is missing counts as null."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_MAXIMUM_BYTES = 8 * 2**20  # MongoDB takes 16 MiB (its manual, "BSON Documents"); larger things are objects
_MAXIMUM_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Record:
    """A document as it was at `revision`, which counts from 1."""

    id: str
    revision: int
    document: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Page:
    """Some records, and the cursor that `find` takes to go on after them; None at the end."""

    items: tuple[Record, ...]
    cursor: str | None


class RecordStore(Protocol):
    """JSON documents by kind (a key of `FIELDS`) and id.

    Every verb may raise `StorageUnavailable` and, where it writes, `StorageFull`; after either, the write may or may
    not have happened, and may be tried again. `InvalidRequest` is raised for kinds, fields, ids, cursors and limits
    that cannot be, and for documents that are not JSON (NaN is not) or larger than 8 MiB.
    """

    @property
    def url(self) -> str:
        """Where the records lie, without credentials: fit for messages."""
        ...

    def put_once(self, kind: str, record_id: str, document: Mapping[str, Any]) -> bool:
        """Store a new record durably; False, and no change, if the id is taken by a record that is durable itself."""
        ...

    def put_many(self, kind: str, items: Sequence[tuple[str, Mapping[str, Any]]]) -> int:
        """`put_once` for many (id, document) together; returns how many were new. Nothing is written when one of them
        is no record. After another error any part may be stored, and the same may be put again."""
        ...

    def get(self, kind: str, record_id: str) -> Record | None: ...

    def find(
        self,
        kind: str,
        where: Mapping[str, str | None] | None = None,
        *,
        limit: int = 100,
        cursor: str | None = None,
        newest_first: bool = True,
    ) -> Page:
        """At most `limit` (1 to 1,000) records whose declared fields equal `where`, in the order of their ids."""
        ...

    def compare_and_set(self, kind: str, record_id: str, revision: int, document: Mapping[str, Any]) -> bool:
        """Replace the document durably if the record still is at `revision`; False, and no change, if not."""
        ...

    def count_by(self, kind: str, field: str, where: Mapping[str, str | None] | None = None) -> dict[str, int]:
        """How many of the records that equal `where` have each value of the declared `field`; null is left out."""
        ...

    def ping(self) -> None:
        """Return if the store answers; raises `StorageUnavailable` within seconds otherwise."""
        ...

    def close(self) -> None:
        """Let go of files and connections."""
        ...


def open_records(url: str) -> RecordStore:
    """The store at `sqlite:///path` (four slashes for an absolute path) or `mongodb://host/database`.

    Opening touches neither disk nor network, so that a service starts while its storage is down. Raises
    `InvalidRequest` for any other address.
    """
    # Imported here: the implementations import this module, and only one of them needs pymongo.
    if url.startswith("sqlite:///") and url != "sqlite:///":
        from medloop.storage.sqlite import SqliteRecords

        return SqliteRecords(Path(url.removeprefix("sqlite:///")))
    if url.startswith(("mongodb://", "mongodb+srv://")):
        from medloop.storage.mongo import MongoRecords

        return MongoRecords.open(url)
    scheme = url.partition(":")[0] if ":" in url else "no"
    raise InvalidRequest(f"No records can lie at this address ({scheme} scheme); name sqlite:///… or mongodb://…")


def scan(
    records: RecordStore, kind: str, where: Mapping[str, str | None] | None = None, *, newest_first: bool = True
) -> Iterator[Record]:
    """Every record that equals `where`, read page by page."""
    cursor = None
    while True:
        page = records.find(kind, where, cursor=cursor, newest_first=newest_first)
        yield from page.items
        if (cursor := page.cursor) is None:
            return


# What both implementations check and encode in the same way.


class Encoded(dict[str, Any]):
    """A document that came as JSON `text`, which must be what it says: it is not encoded again."""

    def __init__(self, text: str) -> None:
        """Raises ValueError for what is no JSON object."""
        found = from_json(text, allow_inf_nan=False)
        if not isinstance(found, dict):
            raise ValueError("it is no object")
        super().__init__(found)
        self.text = text


def encode(kind: str, document: Mapping[str, Any]) -> tuple[str, dict[str, str | None]]:
    """The document as JSON text, and the values of its declared fields."""
    declared = {field: _declared(kind, document, path) for field, path in _fields(kind).items()}
    try:
        if isinstance(document, Encoded):
            text = document.text
        else:
            text = json.dumps(dict(document), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        size = len(text.encode())
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidRequest(f"The document for {kind} is not JSON: {exc}.") from exc
    if size > _MAXIMUM_BYTES:
        raise InvalidRequest(f"The document for {kind} has {size} bytes; store what is large as an object.")
    return text, declared


def _declared(kind: str, document: Mapping[str, Any], path: str) -> str | None:
    value: Any = document
    for name in path.split("."):
        if not isinstance(value, Mapping):
            raise InvalidRequest(f"The document for {kind} has no {path}: what is above it must be an object.")
        if (value := value.get(name)) is None:
            return None
    return _check_value(kind, path, value)


def _check_value(kind: str, field: str, value: Any) -> str | None:
    """`value`, if both implementations can look for it; half a surrogate pair, say, has no UTF-8."""
    if value is None:
        return None
    if not isinstance(value, str) or "\0" in value or _SURROGATE.search(value):
        raise InvalidRequest(f"The field {field} of {kind} must be a string of whole characters without NUL, or null.")
    return value


def check_id(record_id: str) -> str:
    if not _ID.fullmatch(record_id):
        raise InvalidRequest(f"{record_id[:140]!r} cannot be the id of a record.")
    return record_id


def check_find(
    kind: str, where: Mapping[str, str | None] | None, limit: int = 1, cursor: str | None = None
) -> dict[str, str | None]:
    """`where`, if `find` or `count_by` may be asked for it."""
    if unknown := (where or {}).keys() - _fields(kind).keys():
        raise InvalidRequest(f"{kind} cannot be found by {', '.join(sorted(unknown))}.")
    if not 1 <= limit <= _MAXIMUM_PAGE:
        raise InvalidRequest(f"A page has 1 to {_MAXIMUM_PAGE} records, not {limit}.")
    if cursor is not None:
        check_id(cursor)
    return {field: _check_value(kind, field, value) for field, value in (where or {}).items()}


def page_of(rows: list[Record], limit: int) -> Page:
    """The page made of up to `limit` + 1 rows: the one too many only says that there is more."""
    items = tuple(rows[:limit])
    return Page(items, items[-1].id if len(rows) > limit else None)


def _fields(kind: str) -> dict[str, str]:
    try:
        return FIELDS[kind]
    except KeyError as exc:
        raise InvalidRequest(f"There are no records of kind {kind!r}.") from exc
