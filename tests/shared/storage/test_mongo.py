"""What only MongoDB does: servers that are away, and addresses with passwords."""

import time

import pytest
from medloop.errors import InvalidRequest, StorageUnavailable
from medloop.storage.mongo import MongoRecords
from medloop.storage.records import open_records

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
    assert time.monotonic() - began < 10
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
