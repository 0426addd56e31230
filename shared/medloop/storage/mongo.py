"""Records in MongoDB or a server that speaks its protocol, through pymongo.

A document is kept as its JSON text, with the declared fields beside it for the indexes: so it comes back exactly as
it was put, whatever its keys (class names may hold dots, which some servers refuse), and as it would from SQLite.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pymongo import MongoClient
from pymongo.collection import Collection
from pymongo.errors import BulkWriteError, ConfigurationError, InvalidURI, OperationFailure, PyMongoError
from pymongo.read_concern import ReadConcern
from pymongo.read_preferences import ReadPreference

from medloop.errors import InvalidRequest, StorageFull, StorageUnavailable
from medloop.storage.records import FIELDS, Page, Record, check_find, check_id, encode, page_of

# MongoDB's error_codes.yml
_DUPLICATE_KEY = 11000
_OUT_OF_DISK_SPACE = 14031
_NOT_ALLOWED = (13, 18, 8000)  # Unauthorized, AuthenticationFailed, Atlas' own
_CONFIRM_EVERY_S = 0.02


class MongoRecords:
    """`RecordStore` in one database, a collection a kind; `url` is only shown, `confirm_s` is how long a record that
    was there already may take to reach a majority of servers."""

    def __init__(
        self, client: MongoClient[dict[str, Any]], database: str, url: str = "mongodb:", *, confirm_s: float = 5.0
    ) -> None:
        self._client = client
        self._confirm_s = confirm_s
        self._database = client[database]
        self._url = url
        self._indexed: set[str] = set()

    @classmethod
    def open(cls, url: str) -> "MongoRecords":
        """The store in the database that `url` names. Writes wait for the journals of a majority of servers."""
        scheme, _, rest = url.partition("://")
        try:
            client: MongoClient[dict[str, Any]] = MongoClient(
                url,
                connect=False,
                appname="medloop",
                w="majority",
                journal=True,
                wTimeoutMS=10_000,
                serverSelectionTimeoutMS=3_000,
                connectTimeoutMS=3_000,
                socketTimeoutMS=10_000,
                waitQueueTimeoutMS=3_000,
            )
            database = client.get_default_database().name
        except (InvalidURI, ConfigurationError, ValueError, TypeError):
            # Without its cause: pymongo's message may quote a password that was not escaped.
            raise InvalidRequest(
                "The address of records must be mongodb://user:password@host/database, with user and password escaped."
            ) from None
        hosts = rest.partition("/")[0].rpartition("@")[2]
        return cls(client, database, f"{scheme}://{hosts}/{database}")

    def __repr__(self) -> str:
        return f"MongoRecords({self.url!r})"

    @property
    def url(self) -> str:
        return self._url

    def put_once(self, kind: str, record_id: str, document: Mapping[str, Any]) -> bool:
        return self.put_many(kind, [(record_id, document)]) == 1

    def put_many(self, kind: str, items: Sequence[tuple[str, Mapping[str, Any]]]) -> int:
        check_find(kind, None)
        rows = []
        for record_id, document in items:
            text, declared = encode(kind, document)
            rows.append({"_id": check_id(record_id), "revision": 1, "document": text, **declared})
        if not rows:
            return 0
        with self._translated():
            collection = self._collection(kind)
            try:
                collection.insert_many(rows, ordered=False)
            except BulkWriteError as exc:
                taken = _taken(exc)
            else:
                return len(rows)
            self._confirm(collection, taken)
        return len(rows) - len(taken)

    def _confirm(self, collection: Collection[dict[str, Any]], ids: Sequence[str]) -> None:
        """Wait until a majority has the records that were there already: one of them may be our own earlier write,
        whose acknowledgement was lost, or one that another process is still waiting for."""
        majority = collection.with_options(read_concern=ReadConcern("majority"), read_preference=ReadPreference.PRIMARY)
        wanted = {"_id": {"$in": sorted(set(ids))}}
        deadline = time.monotonic() + self._confirm_s
        while majority.count_documents(wanted) < len(set(ids)):
            if time.monotonic() > deadline:
                raise StorageUnavailable(f"No majority of {self.url} has confirmed the record yet; try again.")
            time.sleep(_CONFIRM_EVERY_S)

    def get(self, kind: str, record_id: str) -> Record | None:
        check_find(kind, None)
        with self._translated():
            row = self._collection(kind).find_one({"_id": check_id(record_id)})
        return _record(row) if row else None

    def find(
        self,
        kind: str,
        where: Mapping[str, str | None] | None = None,
        *,
        limit: int = 100,
        cursor: str | None = None,
        newest_first: bool = True,
    ) -> Page:
        query: dict[str, Any] = {**check_find(kind, where, limit, cursor)}
        if cursor is not None:
            query["_id"] = {"$lt" if newest_first else "$gt": cursor}
        with self._translated():
            rows = self._collection(kind).find(query).sort("_id", -1 if newest_first else 1).limit(limit + 1)
            return page_of([_record(row) for row in rows], limit)

    def compare_and_set(self, kind: str, record_id: str, revision: int, document: Mapping[str, Any]) -> bool:
        text, declared = encode(kind, document)
        row = {"revision": revision + 1, "document": text, **declared}
        with self._translated():
            result = self._collection(kind).update_one(
                {"_id": check_id(record_id), "revision": revision}, {"$set": row}
            )
        return result.matched_count == 1

    def count_by(self, kind: str, field: str, where: Mapping[str, str | None] | None = None) -> dict[str, int]:
        check_find(kind, {field: None})
        query: dict[str, Any] = {**check_find(kind, where)}
        steps = [{"$match": query}, {"$group": {"_id": f"${field}", "count": {"$sum": 1}}}]
        with self._translated():
            rows = list(self._collection(kind).aggregate(steps))
        return {row["_id"]: row["count"] for row in rows if row["_id"] is not None}

    def ping(self) -> None:
        with self._translated():
            self._database.command("ping")

    def close(self) -> None:
        with self._translated():
            self._client.close()

    def _collection(self, kind: str) -> Collection[dict[str, Any]]:
        """The collection, its indexes made by whoever uses it first."""
        collection = self._database[kind]
        if kind not in self._indexed:
            for field in FIELDS[kind]:
                collection.create_index([(field, 1), ("_id", 1)])
            self._indexed.add(kind)
        return collection

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except BulkWriteError as exc:
            raise self._failure(_first_code(exc)) from exc
        except OperationFailure as exc:
            raise self._failure(exc.code) from exc
        except PyMongoError as exc:
            reason = type(exc).__name__
            raise StorageUnavailable(f"The records at {self.url} cannot be reached ({reason}); check it runs.") from exc

    def _failure(self, code: int | None) -> StorageFull | StorageUnavailable:
        if code == _OUT_OF_DISK_SPACE:
            return StorageFull(f"The disk of {self.url} is full; free some space and try again.")
        if code in _NOT_ALLOWED:
            return StorageUnavailable(f"{self.url} refused our credentials; check them and their role.")
        return StorageUnavailable(f"The records at {self.url} failed (code {code}); try again.")


def _taken(exc: BulkWriteError) -> list[str]:
    """The ids of a batch that were there already; raises `exc` again where anything else went wrong too."""
    errors = exc.details["writeErrors"]
    if exc.details.get("writeConcernErrors") or any(error["code"] != _DUPLICATE_KEY for error in errors):
        raise exc
    return [error["op"]["_id"] for error in errors]


def _first_code(exc: BulkWriteError) -> int | None:
    """What went wrong in a batch, other than ids that were there already."""
    errors = [*exc.details["writeErrors"], *exc.details.get("writeConcernErrors", ())]
    return next((error["code"] for error in errors if error["code"] != _DUPLICATE_KEY), exc.code)


def _record(row: Mapping[str, Any]) -> Record:
    return Record(row["_id"], row["revision"], json.loads(row["document"]))
