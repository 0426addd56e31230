"""Records in MongoDB or a server that speaks its protocol, through pymongo.

A document is kept as its JSON text, with the declared fields beside it for the indexes: so it comes back exactly as
it was put, whatever its keys (class names may hold dots, which some servers refuse), and as it would from SQLite.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pymongo import MongoClient
from pymongo.collection import Collection
from pymongo.errors import ConfigurationError, DuplicateKeyError, InvalidURI, OperationFailure, PyMongoError

from medloop.errors import InvalidRequest, StorageFull, StorageUnavailable
from medloop.storage.records import FIELDS, Page, Record, check_find, check_id, encode, page_of

_OUT_OF_DISK_SPACE = 14031  # MongoDB's error_codes.yml
_NOT_ALLOWED = (13, 18, 8000)  # Unauthorized, AuthenticationFailed, Atlas' own


class MongoRecords:
    """`RecordStore` in one database, a collection a kind; `url` is only shown."""

    def __init__(self, client: MongoClient[dict[str, Any]], database: str, url: str = "mongodb:") -> None:
        self._client = client
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
        text, declared = encode(kind, document)
        row = {"_id": check_id(record_id), "revision": 1, "document": text, **declared}
        with self._translated():
            try:
                self._collection(kind).insert_one(row)
            except DuplicateKeyError:
                return False
            return True

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
        except OperationFailure as exc:
            if exc.code == _OUT_OF_DISK_SPACE:
                raise StorageFull(f"The disk of {self.url} is full; free some space and try again.") from exc
            if exc.code in _NOT_ALLOWED:
                raise StorageUnavailable(f"{self.url} refused our credentials; check them and their role.") from exc
            raise StorageUnavailable(f"The records at {self.url} failed (code {exc.code}); try again.") from exc
        except PyMongoError as exc:
            reason = type(exc).__name__
            raise StorageUnavailable(f"The records at {self.url} cannot be reached ({reason}); check it runs.") from exc


def _record(row: Mapping[str, Any]) -> Record:
    return Record(row["_id"], row["revision"], json.loads(row["document"]))
