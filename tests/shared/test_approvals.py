import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from medloop.approvals import PRIVATE_KEY_FILE, Signer, Verifier
from medloop.errors import StorageUnavailable, UntrustedModel
from medloop.schemas import Approval

WHAT = {"model": "cells", "version": "3", "bundle_digest": "d" * 64}


def make_approval(**changes: Any) -> Approval:
    fields = {**WHAT, "sequence": 1, "action": "approve", "decision_id": "x", "approver": "Ada", "key_id": ""}
    return Approval.model_validate(fields | changes)


def test_a_signed_approval_verifies_after_a_round_trip_through_json(tmp_path: Path) -> None:
    signed = Signer.open(tmp_path).sign(make_approval())
    Verifier.open(tmp_path).check(Approval.model_validate_json(signed.model_dump_json()), **WHAT)


@pytest.mark.parametrize(
    "change",
    [
        {"version": "4"},
        {"approver": "Eve"},
        {"sequence": 2},
        {"bundle_digest": "e" * 64},
        {"action": "rollback"},
        {"signature": "AAAA"},
        {"signature": "not base64!"},
    ],
)
def test_any_change_after_signing_is_noticed(tmp_path: Path, change: dict[str, Any]) -> None:
    changed = Signer.open(tmp_path).sign(make_approval()).model_copy(update=change)
    with pytest.raises(UntrustedModel, match="signature does not verify"):
        Verifier.open(tmp_path).check(
            changed, model=changed.model, version=changed.version, bundle_digest=changed.bundle_digest
        )


@pytest.mark.parametrize("change", [{"model": "lungs"}, {"version": "2"}, {"bundle_digest": "0" * 64}])
def test_an_approval_speaks_of_one_version_and_bundle_only(tmp_path: Path, change: dict[str, str]) -> None:
    signed = Signer.open(tmp_path).sign(make_approval())
    with pytest.raises(UntrustedModel, match="approval is for"):
        Verifier.open(tmp_path).check(signed, **{**WHAT, **change})


def test_a_foreign_key_is_not_trusted(tmp_path: Path) -> None:
    Signer.open(tmp_path)
    foreign = Signer(Ed25519PrivateKey.generate()).sign(make_approval())
    with pytest.raises(UntrustedModel, match="not trusted here"):
        Verifier.open(tmp_path).check(foreign, **WHAT)


def test_the_key_is_made_once_and_readable_by_its_owner_only(tmp_path: Path) -> None:
    first, second = Signer.open(tmp_path), Signer.open(tmp_path)
    assert first.key_id == second.key_id
    assert stat.S_IMODE((tmp_path / PRIVATE_KEY_FILE).stat().st_mode) == 0o600


def test_a_damaged_key_is_said_and_not_replaced(tmp_path: Path) -> None:
    (tmp_path / PRIVATE_KEY_FILE).write_text("not a key")
    with pytest.raises(StorageUnavailable, match=r"approval\.key"):
        Signer.open(tmp_path)
    assert (tmp_path / PRIVATE_KEY_FILE).read_text() == "not a key"
