"""Approvals and rollbacks that are asked for twice, cut off half way, or whose champion is gone."""

import uuid
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from medloop.approvals import Signer
from medloop.registry import CHAMPION, TAG_APPROVAL, TAG_DIGEST, Registry, Version
from medloop.schemas import Approval
from medloop.storage.records import RecordStore

pytestmark = pytest.mark.anyio

MODEL = "tiny"
RegisterVersion = Callable[..., Version]


async def approve(client: httpx.AsyncClient, version: str, **more: object) -> httpx.Response:
    return await client.post("/approvals", json={"model": MODEL, "version": version, "approver": "Dr A", **more})


async def rollback(client: httpx.AsyncClient, **more: object) -> httpx.Response:
    return await client.post("/rollback", json={"model": MODEL, "approver": "Dr B", **more})


async def sequences(client: httpx.AsyncClient) -> list[int]:
    return [entry["approval"]["sequence"] for entry in (await client.get(f"/timeline/{MODEL}")).json()]


def champion(registry: Registry) -> str | None:
    found = registry.at_alias(MODEL, CHAMPION)
    return None if found is None else found.version


@pytest.fixture
async def two(client: httpx.AsyncClient, register: RegisterVersion) -> list[Approval]:
    """Version 1 was the champion, version 2 is."""
    answers = []
    for version, bias in (("1", 0.0), ("2", 0.01)):
        register(bias=bias)
        answers.append(await approve(client, version))
    return [Approval.model_validate(answer.json()) for answer in answers]


def cut_off_rollback(two: list[Approval], home: Path, records: RecordStore) -> Approval:
    """A rollback to version 1 whose process died right after the record was written."""
    changes = {"id": f"{MODEL}:000000003", "sequence": 3, "action": "rollback", "approver": "Dr B"}
    signed = Signer.open(home / "keys").sign(two[0].model_copy(update=changes))
    assert records.put_once("approvals", signed.id, signed.model_dump(mode="json"))
    return signed


async def test_a_rollback_asked_for_twice_is_done_once(
    client: httpx.AsyncClient, two: list[Approval], registry: Registry
) -> None:
    first = await rollback(client, champion="2")
    again = await rollback(client, champion="2", approver="Dr C")
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json()
    assert champion(registry) == "1"
    assert await sequences(client) == [3, 2, 1]
    forward = await rollback(client, champion="1")  # from the champion of now it is another rollback
    assert (forward.status_code, forward.json()["version"]) == (201, "2")


async def test_a_rollback_that_was_cut_off_is_completed_not_undone(
    client: httpx.AsyncClient, two: list[Approval], registry: Registry, records: RecordStore, home: Path
) -> None:
    signed = cut_off_rollback(two, home, records)
    assert champion(registry) == "2"
    retried = await rollback(client, champion="2")
    assert retried.status_code == 200
    assert Approval.model_validate(retried.json()) == signed
    assert champion(registry) == "1"
    events = [record.document for record in records.find("audit", {"type": "rollback"}).items]
    assert [(event["approval"], event["actor"], event["request_id"]) for event in events] == [(signed.id, "Dr B", None)]


async def test_every_approval_has_one_audit_event_in_the_order_of_time(
    client: httpx.AsyncClient, two: list[Approval], records: RecordStore
) -> None:
    back = (await rollback(client, champion="2")).json()
    await rollback(client, champion="2")
    await approve(client, "1")
    events = records.find("audit", newest_first=False).items
    assert [event.document["approval"] for event in events] == [two[0].id, two[1].id, back["id"]]
    assert all(event.document["request_id"] for event in events)
    assert {(uuid.UUID(event.id).version, uuid.UUID(event.id).variant) for event in events} == {(7, uuid.RFC_4122)}


async def test_a_champion_that_another_person_changed_is_not_changed_unseen(
    client: httpx.AsyncClient, register: RegisterVersion, two: list[Approval], registry: Registry
) -> None:
    register(bias=0.02)
    for refused in (await approve(client, "3", champion="1"), await rollback(client, champion="1")):
        assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
        assert "is version 2, not 1: Dr A approved version 2 on 20" in refused.json()["detail"]
    assert await sequences(client) == [2, 1]
    assert (await approve(client, "2", champion="1")).status_code == 200  # the very approval that is asked for
    assert (await approve(client, "3", champion="2")).status_code == 201
    refused = await rollback(client, champion="2")  # version 3 came by approval, not by leaving version 2
    assert refused.status_code == 409
    assert champion(registry) == "3"


def delete(registry: Registry) -> None:
    registry.client.delete_model_version(MODEL, "2")


def edit(registry: Registry) -> None:
    registry.set_tag(MODEL, "2", TAG_DIGEST, "0" * 64)


@pytest.mark.parametrize("lose", [delete, edit])
async def test_a_champion_that_is_gone_does_not_switch_the_gate_off(
    client: httpx.AsyncClient,
    register: RegisterVersion,
    two: list[Approval],
    registry: Registry,
    lose: Callable[[Registry], None],
) -> None:
    register(bias=3.0)
    lose(registry)
    decision = (await client.post("/gate", json={"model": MODEL, "version": "3"})).json()
    assert (decision["outcome"], decision["champion"]) == ("fail", "2")
    assert "is not in MLflow as it was approved" in decision["reason"]
    for refused in (
        await approve(client, "3"),
        await approve(client, "3", bootstrap=True),
        await approve(client, "3", bootstrap=True, override="let me in"),
    ):
        assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    assert f"medloop approve {MODEL} 3" in refused.json()["detail"]
    assert await sequences(client) == [2, 1]
    overridden = await approve(client, "3", override="version 2 was deleted by mistake")
    assert (overridden.status_code, overridden.json()["sequence"]) == (201, 3)
    timeline = (await client.get(f"/timeline/{MODEL}")).json()
    assert timeline[0]["decision"] == decision


async def test_from_a_champion_that_is_gone_one_can_go_back(
    client: httpx.AsyncClient, two: list[Approval], registry: Registry
) -> None:
    delete(registry)
    back = await rollback(client, champion="2")
    assert (back.status_code, back.json()["version"]) == (201, "1")
    assert champion(registry) == "1"


async def test_a_tag_that_nobody_signed_takes_no_number(
    client: httpx.AsyncClient, register: RegisterVersion, two: list[Approval], registry: Registry
) -> None:
    forged = two[1].model_copy(update={"id": f"{MODEL}:999999999", "sequence": 999_999_999})
    registry.set_model_tag(MODEL, TAG_APPROVAL, forged.model_dump_json())
    register(bias=0.02)
    assert (await approve(client, "3")).json()["sequence"] == 3


async def test_where_records_were_lost_the_signed_tag_still_counts(
    client: httpx.AsyncClient, register: RegisterVersion, two: list[Approval], registry: Registry, home: Path
) -> None:
    changes = {"id": f"{MODEL}:000000007", "sequence": 7}
    newer = Signer.open(home / "keys").sign(two[1].model_copy(update=changes))
    registry.set_model_tag(MODEL, TAG_APPROVAL, newer.model_dump_json())
    register(bias=0.02)
    assert (await approve(client, "3")).json()["sequence"] == 8
