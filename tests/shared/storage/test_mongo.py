"""What only MongoDB does: servers that are away, and addresses with passwords."""

import time
from typing import Any

import mongomock
import pytest
from medloop.errors import InvalidRequest, StorageFull, StorageUnavailable
from medloop.storage.mongo import MongoRecords
from medloop.storage.records import open_records
from pymongo.errors import BulkWriteError
from pymongo.read_concern import ReadConcern

PASSWORDS = "mongodb://somebody:hunter2@127.0.0.1:1,127.0.0.1:2/clinic?authSource=admin"


def test_opening_does_not_connect_and_hides_the_password() -> None:
    records = open_records(PASSWORDS)
    assert isinstance(records, MongoRecords)
    assert records.url == "mongodb://127.0.0.1:1,127.0.0.1:2/clinic"
    assert "hunter2" not in repr(records)
    records.close()


def test_a_server_that_is_away_is_told_in_seconds() -> None:
    records = open_records(PASSWORDS)
    began = time.monotonic()
    with pytest.raises(StorageUnavailable, match="cannot be reached") as caught:
        records.put_once("audit", "1", {})
    assert time.monotonic() - began < 25  # the driver's own patience is half a minute, and 3 s are expected
    assert "hunter2" not in str(caught.value)
    records.close()


@pytest.mark.parametrize(
    "url",
    [
        "mongodb://somebody:hunter2@host",  # no database
        "mongodb://somebody:hun/ter2@host/clinic",
        "mongodb://somebody:hun@ter2@host/clinic",
        "mongodb://somebody:hunter2@host:port/clinic",
        "mongodb://",
    ],
)
def test_impossible_addresses_are_not_repeated(url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        open_records(url)
    assert "hun" not in str(caught.value)
    assert caught.value.__cause__ is None


class LaggingCollection:
    """Takes writes at once, while a majority has only what it had `lag` looks before."""

    def __init__(self, collection: Any, lag: int) -> None:
        self._collection, self._lag = collection, lag

    def __getattr__(self, name: str) -> Any:
        return getattr(self._collection, name)

    def with_options(self, *, read_concern: ReadConcern, **options: Any) -> "LaggingCollection":
        assert read_concern.level == "majority"
        return self

    def count_documents(self, wanted: dict[str, Any]) -> int:
        self._lag -= 1
        return 0 if self._lag >= 0 else int(self._collection.count_documents(wanted))


class BrokenCollection:
    """Answers every batch with these errors."""

    def __init__(self, details: dict[str, Any]) -> None:
        self._details = details

    def create_index(self, keys: Any) -> None:
        """Nothing to look for."""

    def insert_many(self, rows: list[dict[str, Any]], ordered: bool) -> None:
        errors = [error | {"op": rows[error["index"]]} for error in self._details["writeErrors"]]
        raise BulkWriteError(self._details | {"writeErrors": errors})


def _records(collection: Any, **options: Any) -> MongoRecords:
    client: Any = {"medloop": {"audit": collection}}
    return MongoRecords(client, "medloop", **options)


def test_what_is_there_already_is_claimed_once_a_majority_has_it() -> None:
    stored: Any = mongomock.MongoClient()["medloop"]["audit"]
    stored.insert_one({"_id": "1", "revision": 1, "document": "{}"})
    assert not _records(LaggingCollection(stored, lag=3)).put_once("audit", "1", {})
    assert _records(LaggingCollection(stored, lag=3)).put_many("audit", [("1", {}), ("2", {})]) == 1
    never = _records(LaggingCollection(stored, lag=10**6), confirm_s=0.05)
    with pytest.raises(StorageUnavailable, match="No majority"):
        never.put_once("audit", "1", {})
    with pytest.raises(StorageUnavailable, match="No majority"):
        never.put_many("audit", [("1", {}), ("3", {})])
    assert never.put_once("audit", "4", {})  # a new one waits for the write's own acknowledgement


@pytest.mark.parametrize(
    ("errors", "concern", "expected"),
    [
        ([], [{"code": 64, "errmsg": "waiting for replication timed out"}], StorageUnavailable),
        ([{"index": 0, "code": 11000}], [{"code": 64, "errmsg": "timed out"}], StorageUnavailable),
        ([{"index": 0, "code": 11000}, {"index": 1, "code": 14031}], [], StorageFull),
        ([{"index": 1, "code": 13}], [], StorageUnavailable),
    ],
)
def test_a_batch_is_not_claimed_when_anything_but_a_duplicate_went_wrong(
    errors: list[dict[str, Any]], concern: list[dict[str, Any]], expected: type[Exception]
) -> None:
    records = _records(BrokenCollection({"writeErrors": errors, "writeConcernErrors": concern, "nInserted": 1}))
    with pytest.raises(expected):
        records.put_many("audit", [("1", {}), ("2", {})])
