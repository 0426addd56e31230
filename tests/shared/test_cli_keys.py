import json
from pathlib import Path
from typing import Any

import pytest
from medloop.auth.keyring import KeyRing
from medloop.errors import Unauthenticated
from medloop.storage.records import RecordStore


@pytest.fixture
def ring(records: RecordStore, home: Path) -> KeyRing:
    return KeyRing(records, home / "kept.json", seconds=60)


def test_a_key_lives_from_issue_to_revoke(medloop: Any, ring: KeyRing) -> None:
    issue = ("keys", "issue", "--name", "clinic", "--scopes", "predict, correct", "--expires", "90d", "--rate", "50")
    status, text, said = medloop(*issue)
    text = text.strip()
    assert status == 0
    assert text.startswith("mlk_")
    assert "not shown again" in " ".join(said.split())
    ring.refresh()
    key = ring.check(text)
    assert (key.name, key.scopes, key.rate) == ("clinic", ["correct", "predict"], 50)
    assert key.expires_at is not None
    assert (key.expires_at - key.created_at).days == 90

    _, listed, _ = medloop("keys", "list")
    assert key.id in listed
    assert text.split("_", 2)[2] not in listed
    assert key.digests[0].sha256 not in medloop("keys", "list", "--json")[1]

    renewed = json.loads(medloop("keys", "rotate", "clinic", "--grace", "1h", "--json")[1])["key"]
    ring.refresh()
    assert ring.check(text).id == ring.check(renewed).id == key.id

    assert medloop("keys", "revoke", key.id)[:2] == (0, f"Key {key.id} of clinic is revoked.\n")
    ring.refresh()
    for over in (text, renewed):
        with pytest.raises(Unauthenticated):
            ring.check(over)
    assert json.loads(medloop("keys", "list", "--json")[1])["keys"][0]["state"] == "revoked"


@pytest.mark.parametrize(
    ("arguments", "status", "word"),
    [
        (("issue", "--name", "a", "--scopes", "predict,fly"), 3, "fly"),
        (("issue", "--name", "a", "--scopes", "predict", "--expires", "soon"), 3, "90d"),
        (("issue", "--name", "a", "--scopes", "predict", "--expires", "0d"), 3, "90d"),
        (("issue", "--name", "a", "--scopes", "predict", "--rate", "-1"), 3, "rate"),
        (("issue", "--name", "a"), 2, "scopes"),
        (("rotate", "nobody"), 6, "nobody"),
        (("revoke", "nobody"), 6, "nobody"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(medloop: Any, arguments: tuple[str, ...], status: int, word: str) -> None:
    got, out, err = medloop("keys", *arguments)
    assert (got, out) == (status, "")
    assert word in err
