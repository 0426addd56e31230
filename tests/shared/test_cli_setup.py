import json
from pathlib import Path
from typing import Any

import pytest
from medloop.approvals import Signer, Verifier
from medloop.auth.keyring import KeyRing
from medloop.errors import Unauthenticated
from medloop.storage.records import RecordStore

KEY = "mlk_0123456789ab_" + "5" * 64


def test_setup_makes_keys_once_and_shares_the_public_one_only(
    medloop: Any, records: RecordStore, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDLOOP_API_KEY", KEY)
    first = json.loads(medloop("setup", "--json")[1])
    assert json.loads(medloop("setup", "--json")[1]) == first
    assert [path.name for path in (home / "keys" / "trusted").iterdir()] == ["approval.pub"]
    assert first["key_id"] == Signer.open(home / "keys").key_id
    assert first["key_id"] in Verifier.open(home / "keys" / "trusted")._keys
    ring = KeyRing(records, home / "kept.json", seconds=60)
    ring.refresh()
    known = ring.check(KEY)
    assert (known.id, known.name) == ("0123456789ab", "dashboard")
    assert "act-as" in known.scopes
    assert "admin" not in known.scopes
    assert KEY not in json.dumps(first)


@pytest.mark.parametrize(
    ("key", "status", "word"),
    [
        ("mlk_0123456789ab_short", 3, "random characters"),
        ("anything", 3, "random characters"),
        ("mlk_change-me", 3, "MEDLOOP_API_KEY still has the placeholder"),
    ],
)
def test_a_key_that_could_be_guessed_is_refused(
    medloop: Any, monkeypatch: pytest.MonkeyPatch, key: str, status: int, word: str
) -> None:
    monkeypatch.setenv("MEDLOOP_API_KEY", key)
    got, out, err = medloop("setup")
    assert (got, out) == (status, "")
    assert word in " ".join(err.split())
    assert key not in err


def test_a_key_that_is_not_the_dashboards_holds_nothing_else_up(
    medloop: Any, records: RecordStore, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDLOOP_API_KEY", KEY)
    assert medloop("setup")[0] == 0
    other = KEY.replace("0123456789ab", "ba9876543210")
    monkeypatch.setenv("MEDLOOP_API_KEY", other)
    status, out, err = medloop("setup", "--json")
    assert (status, json.loads(out)["dashboard"]) == (0, None)
    assert "The dashboard has no access: dashboard has a key already; rotate or revoke that one." in " ".join(
        err.split()
    )
    ring = KeyRing(records, home / "kept.json", seconds=60)
    ring.refresh()
    with pytest.raises(Unauthenticated):
        ring.check(other)


def test_a_key_that_was_revoked_does_not_come_back(
    medloop: Any, records: RecordStore, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDLOOP_API_KEY", KEY)
    assert medloop("setup")[0] == 0
    assert medloop("keys", "revoke", "dashboard")[0] == 0
    status, out, _ = medloop("setup", "--json")
    assert (status, json.loads(out)["dashboard"]) == (0, None)
    assert "was revoked" in json.loads(out)["refused"]
    ring = KeyRing(records, home / "kept.json", seconds=60)
    ring.refresh()
    with pytest.raises(Unauthenticated):
        ring.check(KEY)
