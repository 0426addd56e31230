import json
from datetime import timedelta

import pytest
from medloop.auth.keys import KIND, ApiKeys, split
from medloop.errors import Conflict, InvalidRequest, NotFound
from medloop.schemas import now
from medloop.storage.records import RecordStore


@pytest.fixture
def keys(records: RecordStore) -> ApiKeys:
    return ApiKeys(records)


def secret(text: str) -> str:
    parts = split(text)
    assert parts is not None
    return parts[1]


def test_only_a_hash_of_256_random_bits_is_stored(keys: ApiKeys, records: RecordStore) -> None:
    issued = keys.issue("clinic", ["predict", "correct"], rate=50)
    assert issued.text.startswith(f"mlk_{issued.key.id}_")
    assert len(secret(issued.text)) == 43  # 256 bits, six a character
    record = records.get(KIND, issued.key.id)
    assert record is not None
    assert secret(issued.text) not in json.dumps(record.document)
    assert secret(issued.text) not in repr(issued)
    assert keys.all() == [issued.key]
    assert issued.key.opened_by(secret(issued.text), now())
    assert not issued.key.opened_by(secret(issued.text)[:-1], now())


def test_a_rotated_key_opens_with_the_old_secret_for_its_grace_only(keys: ApiKeys) -> None:
    first = secret(keys.issue("clinic", ["predict"]).text)
    rotated = keys.rotate("clinic", timedelta(hours=1))
    assert rotated.key.opened_by(secret(rotated.text), now())
    assert rotated.key.opened_by(first, now())
    assert not rotated.key.opened_by(first, now() + timedelta(hours=1, seconds=1))
    at_once = keys.rotate(rotated.key.id)
    assert not at_once.key.opened_by(secret(rotated.text), now())
    assert not at_once.key.opened_by(first, now())


def test_a_revoked_key_is_over_and_frees_its_name(keys: ApiKeys) -> None:
    issued = keys.issue("clinic", ["predict"])
    with pytest.raises(Conflict, match="has a key already"):
        keys.issue("clinic", ["approve"])
    revoked = keys.revoke("clinic")
    assert keys.revoke(issued.key.id) == revoked
    assert not revoked.opened_by(secret(issued.text), now())
    with pytest.raises(Conflict, match="revoked"):
        keys.rotate(issued.key.id)
    assert keys.issue("clinic", ["predict"]).key.id != issued.key.id


@pytest.mark.parametrize(
    ("name", "scopes", "rate"),
    [
        ("", ["predict"], None),
        ("x" * 201, ["predict"], None),
        ("a", ["fly"], None),
        ("a", [], None),
        ("a", ["predict"], 0),
    ],
)
def test_keys_that_cannot_be_are_refused(keys: ApiKeys, name: str, scopes: list[str], rate: float | None) -> None:
    with pytest.raises(InvalidRequest):
        keys.issue(name, scopes, rate=rate)
    assert keys.all() == []


def test_unknown_keys_are_not_found(keys: ApiKeys) -> None:
    with pytest.raises(NotFound):
        keys.revoke("nobody")
