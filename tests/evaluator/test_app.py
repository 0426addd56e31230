"""The API over real stores: evaluation, gate, approvals, rollback, timeline, and what is refused."""

import asyncio
import csv
import io
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from medloop.approvals import Verifier
from medloop.data.manifest import Manifest
from medloop.errors import StorageUnavailable
from medloop.http import Readiness
from medloop.registry import (
    CHAMPION,
    PREVIOUS,
    TAG_APPROVAL,
    TAG_DIGEST,
    Registry,
    Version,
)
from medloop.schemas import Approval, EvaluationReport, TimelineEntry
from medloop.storage.objects import ObjectStore
from medloop.storage.records import RecordStore
from medloop.testing import asgi_client, tiny_probabilities
from medloop.vision.prepare import PreparationSpec, prepare
from medloop_evaluator.app import create_app, keep_checking
from medloop_evaluator.settings import EvaluatorSettings

pytestmark = pytest.mark.anyio

MODEL = "tiny"
TEST_IMAGES = 80
RegisterVersion = Callable[..., Version]


async def evaluate(client: httpx.AsyncClient, version: str, split: str = "test") -> dict[str, object]:
    body = {"model": MODEL, "version": version, "split": split}
    answer = await client.post("/evaluate", json=body)
    assert answer.status_code == 202, answer.text
    job: dict[str, object] = answer.json()
    for _ in range(2400):
        if job["status"] in ("succeeded", "failed"):
            return job
        await asyncio.sleep(0.05)
        job = (await client.get(f"/jobs/{job['id']}")).json()
    raise TimeoutError("the evaluation did not end")


async def approve(client: httpx.AsyncClient, version: str, **more: object) -> httpx.Response:
    return await client.post("/approvals", json={"model": MODEL, "version": version, "approver": "Dr A", **more})


async def rollback(client: httpx.AsyncClient) -> httpx.Response:
    return await client.post("/rollback", json={"model": MODEL, "approver": "Dr B", "reason": "looks wrong"})


@pytest.mark.usefixtures("hanging_s3")
async def test_a_request_is_told_in_time_that_objects_hang(register: RegisterVersion) -> None:
    register()
    async with asgi_client(create_app(EvaluatorSettings())) as client:
        began = time.monotonic()
        answer = await client.get(f"/reports/{MODEL}/1")
        assert time.monotonic() - began < 30  # S3 alone would be waited for two minutes
    assert (answer.status_code, answer.json()["code"]) == (503, "storage-unavailable")
    assert int(answer.headers["retry-after"]) > 0


async def test_the_gate_reads_all_images_with_patience(
    client: httpx.AsyncClient,
    register: RegisterVersion,
    newer_dataset: Manifest,
    tracking_uri: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    register()
    await approve(client, "1")
    register(dataset_id=newer_dataset.id)
    monkeypatch.setenv("MEDLOOP_OBJECTS_SECONDS", "1e-9")  # too little for any answer
    async with asgi_client(create_app(EvaluatorSettings())) as impatient:
        answer = await impatient.post("/gate", json={"model": MODEL, "version": "2"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["figures"]["images"] == TEST_IMAGES


async def test_an_evaluation_reports_what_the_network_really_answers(
    client: httpx.AsyncClient, register: RegisterVersion, dataset: Manifest, objects: ObjectStore, registry: Registry
) -> None:
    version = register()
    assert (await client.get(f"/reports/{MODEL}/1")).status_code == 404
    job = await evaluate(client, "1")
    assert job["status"] == "succeeded", job
    report = EvaluationReport.model_validate((await client.get(f"/reports/{MODEL}/1", params={"split": "test"})).json())

    spec = PreparationSpec(mode="L", size=16)
    expected = {
        number: tiny_probabilities(prepare(objects.get(row.location), spec))
        for number, row in enumerate(dataset.rows)
        if row.split == "test"
    }
    right = [dataset.classes[int(p.argmax())] == dataset.rows[number].label for number, p in expected.items()]
    assert report.images == TEST_IMAGES
    assert report.metrics["accuracy"].value == pytest.approx(np.mean(right))
    assert 0 < sum(right) < TEST_IMAGES
    assert np.sum(report.confusion) == TEST_IMAGES
    assert len(report.worst) == min(24, TEST_IMAGES - sum(right))
    assert report.model.run_id == version.run_id

    artifact = Path(registry.client.download_artifacts(version.run_id, "evaluation/test"))
    table = list(csv.DictReader(io.StringIO((artifact / "predictions.csv").read_text())))
    assert [int(line["row"]) for line in table] == sorted(expected)
    for line in table:
        found = [float(line["p_dark"]), float(line["p_bright"])]
        assert found == pytest.approx(expected[int(line["row"])], abs=1e-6)
        assert np.float32(line["p_dark"]) == np.float32(found[0])
    names = {path.name for path in artifact.iterdir()}
    assert names == {
        "report.json",
        "predictions.csv",
        "misclassified.csv",
        "misclassified",
        "confusion_matrix.png",
        "reliability.png",
        "roc.png",
    }
    pictures = sorted(path.name for path in (artifact / "misclassified").iterdir())
    assert len(pictures) == len(report.worst)
    assert pictures[0].startswith(f"00_{report.worst[0].label}_as_{report.worst[0].predicted}")
    assert json.loads((artifact / "report.json").read_text())["images"] == TEST_IMAGES
    metrics = registry.client.get_run(version.run_id).data.metrics
    assert metrics["test_accuracy"] == report.metrics["accuracy"].value
    assert metrics["test_ece_low"] == report.metrics["ece"].low


async def test_an_evaluation_is_done_once(client: httpx.AsyncClient, register: RegisterVersion) -> None:
    register()
    first = await evaluate(client, "1")
    again = await evaluate(client, "1")
    other = await evaluate(client, "1", split="val")
    assert again["id"] == first["id"]
    assert other["id"] != first["id"]


async def test_a_report_that_was_lost_is_made_again(
    client: httpx.AsyncClient, register: RegisterVersion, home: Path
) -> None:
    register()
    first = await evaluate(client, "1")
    for kept in (home / "objects" / "evaluations").rglob("report.json*"):
        kept.unlink()
    assert (await client.get(f"/reports/{MODEL}/1")).status_code == 404
    second = await evaluate(client, "1")
    assert second["id"] != first["id"]
    assert (await client.get(f"/reports/{MODEL}/1")).status_code == 200
    assert (await evaluate(client, "1"))["id"] in (first["id"], second["id"])  # nothing is missing now


async def test_another_bundle_under_the_same_number_is_another_evaluation(
    client: httpx.AsyncClient,
    register: RegisterVersion,
    registry: Registry,
    newer_dataset: Manifest,
) -> None:
    register()
    assert (await evaluate(client, "1"))["status"] == "succeeded"
    old = (await client.get(f"/reports/{MODEL}/1")).json()
    registry.client.delete_registered_model(MODEL)
    assert register(bias=3.0, dataset_id=newer_dataset.id).version == "1"
    assert (await evaluate(client, "1"))["status"] == "succeeded"
    new = (await client.get(f"/reports/{MODEL}/1")).json()
    assert new["model"]["dataset_id"] == newer_dataset.id
    assert new["model"]["bundle_digest"] != old["model"]["bundle_digest"]


async def test_unknown_versions_and_bad_requests_are_told_apart(
    client: httpx.AsyncClient, register: RegisterVersion
) -> None:
    register()
    for path, body in (
        ("/evaluate", {"model": MODEL, "version": "9"}),
        ("/evaluate", {"model": "nobody", "version": "1"}),
        ("/gate", {"model": MODEL, "version": "9"}),
        ("/approvals", {"model": MODEL, "version": "9", "approver": "Dr A"}),
        ("/rollback", {"model": "nobody", "approver": "Dr A"}),
    ):
        answer = await client.post(path, json=body)
        assert (answer.status_code, answer.json()["code"]) == (404, "not-found"), path
    assert (await client.post("/evaluate", json={"model": MODEL, "version": "1", "splt": "val"})).status_code == 422
    assert (await client.post("/evaluate", json={"model": "UPPER", "version": "1"})).status_code == 422
    assert (await client.get("/jobs/0190b5a0-0000-7000-8000-000000000000")).status_code == 404


async def test_the_first_champion_by_a_named_person(
    client: httpx.AsyncClient, register: RegisterVersion, registry: Registry, home: Path, records: RecordStore
) -> None:
    version = register()
    answer = await approve(client, "1")
    assert answer.status_code == 201, answer.text
    approval = Approval.model_validate(answer.json())
    assert (approval.action, approval.approver, approval.sequence) == ("approve", "Dr A", 1)
    Verifier.open(home / "keys").check(approval, model=MODEL, version="1", bundle_digest=version.tags[TAG_DIGEST])
    state = registry.state(MODEL)
    assert state is not None
    assert state.aliases == {CHAMPION: "1"}
    assert Approval.model_validate_json(state.tags[TAG_APPROVAL]) == approval
    assert Approval.model_validate_json(registry.version(MODEL, "1").tags[TAG_APPROVAL]) == approval
    decision = (await client.post("/gate", json={"model": MODEL, "version": "1"})).json()
    assert (decision["id"], decision["outcome"]) == (approval.decision_id, "no-champion")
    audit = records.find("audit", {"model": MODEL, "actor": "Dr A"}).items
    assert [event.document["approval"] for event in audit] == [approval.id]


async def test_approving_the_champion_again_changes_nothing(
    client: httpx.AsyncClient, register: RegisterVersion
) -> None:
    register()
    first = await approve(client, "1")
    again = await approve(client, "1", approver="Dr C")
    assert again.status_code == 200
    assert again.json() == first.json()


async def test_bootstrap_only_where_there_is_no_champion(client: httpx.AsyncClient, register: RegisterVersion) -> None:
    register()
    first = await approve(client, "1", bootstrap=True)
    assert (first.json()["action"], first.json()["approver"]) == ("bootstrap", "bootstrap")
    register()
    refused = await approve(client, "2", bootstrap=True)
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    assert "has a champion (version 1)" in refused.json()["detail"]


async def test_a_worse_challenger_fails_the_gate_and_needs_a_reason(
    client: httpx.AsyncClient, register: RegisterVersion, registry: Registry
) -> None:
    register()
    await approve(client, "1")
    register(bias=3.0)
    decision = (await client.post("/gate", json={"model": MODEL, "version": "2"})).json()
    assert (decision["outcome"], decision["champion"]) == ("fail", "1")
    assert decision["figures"]["difference_high"] < 0
    assert (await client.post("/gate", json={"model": MODEL, "version": "2"})).json() == decision
    refused = await approve(client, "2")
    assert refused.status_code == 409
    assert "significantly worse" in refused.json()["detail"]
    assert registry.at_alias(MODEL, CHAMPION).version == "1"  # type: ignore[union-attr]
    overridden = await approve(client, "2", override="the old scanner is gone")
    assert overridden.status_code == 201
    assert overridden.json()["reason"] == "the old scanner is gone"
    assert overridden.json()["decision_id"] == decision["id"]
    state = registry.state(MODEL)
    assert state is not None
    assert state.aliases == {CHAMPION: "2", PREVIOUS: "1"}


async def test_an_equal_challenger_passes(client: httpx.AsyncClient, register: RegisterVersion) -> None:
    register()
    await approve(client, "1")
    register(bias=0.01)
    decision = (await client.post("/gate", json={"model": MODEL, "version": "2"})).json()
    assert decision["outcome"] == "pass"
    assert decision["figures"]["images"] == TEST_IMAGES
    assert (await approve(client, "2")).status_code == 201


async def test_champion_and_challenger_meet_on_the_challengers_data(
    client: httpx.AsyncClient, register: RegisterVersion, dataset: Manifest, newer_dataset: Manifest
) -> None:
    register()
    await approve(client, "1")
    register(bias=3.0, dataset_id=newer_dataset.id)
    decision = (await client.post("/gate", json={"model": MODEL, "version": "2"})).json()
    assert decision["dataset_id"] == newer_dataset.id != dataset.id
    assert decision["figures"]["images"] == TEST_IMAGES
    assert decision["figures"]["champion_accuracy"] > decision["figures"]["challenger_accuracy"]


async def test_groups_and_leaks_reach_the_report(
    client: httpx.AsyncClient, register: RegisterVersion, newer_dataset: Manifest
) -> None:
    register(dataset_id=newer_dataset.id)
    assert (await evaluate(client, "1"))["status"] == "succeeded"
    report = EvaluationReport.model_validate((await client.get(f"/reports/{MODEL}/1")).json())
    assert {figure.method for figure in report.metrics.values()} == {"cluster-bootstrap"}
    assert report.leaks == {"exact": 1, "near": 3, "distance": 2}


async def test_rollback_swaps_champion_and_previous(
    client: httpx.AsyncClient, register: RegisterVersion, registry: Registry, home: Path
) -> None:
    register()
    await approve(client, "1")
    nowhere = await rollback(client)
    assert nowhere.status_code == 409
    assert "no previous champion" in nowhere.json()["detail"]
    second = register(bias=0.01)
    await approve(client, "2")
    back = await rollback(client)
    assert back.status_code == 201
    approval = Approval.model_validate(back.json())
    assert (approval.action, approval.version, approval.sequence) == ("rollback", "1", 3)
    assert (approval.approver, approval.reason) == ("Dr B", "looks wrong")
    state = registry.state(MODEL)
    assert state is not None
    assert (state.aliases[CHAMPION], state.aliases[PREVIOUS]) == ("1", "2")
    forward = Approval.model_validate((await rollback(client)).json())
    Verifier.open(home / "keys").check(forward, model=MODEL, version="2", bundle_digest=second.tags[TAG_DIGEST])
    timeline = [TimelineEntry.model_validate(entry) for entry in (await client.get(f"/timeline/{MODEL}")).json()]
    assert [(entry.approval.sequence, entry.approval.version) for entry in timeline] == [
        (4, "2"),
        (3, "1"),
        (2, "2"),
        (1, "1"),
    ]
    assert [entry.decision.outcome for entry in timeline if entry.decision] == ["pass", "no-champion"] * 2


async def test_a_bundle_with_one_byte_changed_is_not_signed(
    client: httpx.AsyncClient, register: RegisterVersion, registry: Registry, tmp_path: Path
) -> None:
    version = register()
    await evaluate(client, "1")  # so that a good copy lies on this machine's own disk
    model = next(path for path in tmp_path.glob("mlruns/**/bundle/model.onnx"))
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    refused = await approve(client, "1")
    assert (refused.status_code, refused.json()["code"]) == (409, "untrusted-model")
    assert "model.onnx" in refused.json()["detail"]
    assert registry.at_alias(MODEL, CHAMPION) is None
    assert TAG_APPROVAL not in registry.version(MODEL, version.version).tags


async def test_a_bundle_of_another_digest_is_not_signed(
    client: httpx.AsyncClient, register: RegisterVersion, registry: Registry
) -> None:
    register()
    registry.set_tag(MODEL, "1", TAG_DIGEST, "0" * 64)
    refused = await approve(client, "1")
    assert (refused.status_code, refused.json()["code"]) == (409, "untrusted-model")


async def test_an_alias_moved_by_hand_does_not_make_a_champion(
    client: httpx.AsyncClient, register: RegisterVersion, registry: Registry
) -> None:
    register()
    await approve(client, "1")
    register(bias=3.0)
    registry.set_alias(MODEL, CHAMPION, "2")
    decision = (await client.post("/gate", json={"model": MODEL, "version": "2"})).json()
    assert (decision["champion"], decision["outcome"]) == ("1", "fail")
    assert (await approve(client, "1")).status_code == 200
    assert registry.at_alias(MODEL, CHAMPION).version == "1"  # type: ignore[union-attr]


async def test_the_ledger_finishes_an_approval_that_was_cut_off(
    client: httpx.AsyncClient, register: RegisterVersion, registry: Registry, records: RecordStore
) -> None:
    register()
    await approve(client, "1")
    register(bias=0.01)
    newer = (await approve(client, "2")).json()
    # As if the process had died right after the record was written.
    first = records.find("approvals", {"version": "1"}).items[0].document
    registry.set_model_tag(MODEL, TAG_APPROVAL, json.dumps(first))
    registry.set_alias(MODEL, CHAMPION, "1")
    registry.delete_alias(MODEL, PREVIOUS)
    assert (await approve(client, "2")).json() == newer
    state = registry.state(MODEL)
    assert state is not None
    assert state.aliases == {CHAMPION: "2", PREVIOUS: "1"}
    assert Approval.model_validate_json(state.tags[TAG_APPROVAL]).sequence == 2


async def test_a_forged_record_does_not_make_a_champion(
    client: httpx.AsyncClient, register: RegisterVersion, records: RecordStore
) -> None:
    register()
    genuine = (await approve(client, "1")).json()
    register(bias=3.0)
    forged = genuine | {"id": f"{MODEL}:000000002", "sequence": 2, "version": "2"}
    records.put_once("approvals", forged["id"], forged)
    decision = (await client.post("/gate", json={"model": MODEL, "version": "2"})).json()
    assert decision["champion"] == "1"
    # Its number is taken all the same.
    assert (await approve(client, "2", override="test")).json()["sequence"] == 3


async def test_of_approvals_at_once_each_gets_its_own_number(
    client: httpx.AsyncClient, register: RegisterVersion
) -> None:
    for bias in (0.0, 0.01, 0.02):
        register(bias=bias)
    answers = await asyncio.gather(*(approve(client, str(number)) for number in (1, 2, 3)))
    assert [answer.status_code for answer in answers] == [201] * 3
    assert sorted(answer.json()["sequence"] for answer in answers) == [1, 2, 3]


async def test_the_process_holds_no_thread_after_it_stops(home: Path, tracking_uri: str) -> None:
    async with asgi_client(create_app(EvaluatorSettings())):
        assert [thread.name for thread in threading.enumerate() if thread.name.startswith("jobs-")]
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(("jobs-", "lease-"))]


async def test_readiness_follows_the_self_check(client: httpx.AsyncClient) -> None:
    for _ in range(1200):
        if (answer := await client.get("/readyz")).status_code == 200:
            break
        await asyncio.sleep(0.05)
    assert answer.json() == {"status": "ready"}


async def test_the_self_check_outlives_what_nobody_expected(caplog: pytest.LogCaptureFixture) -> None:
    readiness, problems = Readiness(), [RuntimeError("a bug"), StorageUnavailable("The disk is gone.")]

    def check() -> None:
        if problems:
            raise problems[0]

    checking = asyncio.create_task(keep_checking(readiness, [check], seconds=0.01))

    async def until(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.01)

    await until(lambda: "unexpectedly" in (readiness.reason or ""))
    assert "a bug" in caplog.text
    problems.pop(0)
    await until(lambda: readiness.reason == "The disk is gone.")
    problems.pop(0)
    await until(lambda: readiness.ready)
    checking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await checking


async def test_mlflow_unreachable_is_told_with_503(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    async with asgi_client(create_app(EvaluatorSettings())) as client:
        for path, body in (
            ("/evaluate", {"model": MODEL, "version": "1"}),
            ("/approvals", {"model": MODEL, "version": "1", "approver": "Dr A"}),
        ):
            answer = await client.post(path, json=body)
            assert (answer.status_code, answer.json()["code"]) == (503, "tracking-unavailable")
        assert (await client.get("/livez")).status_code == 200
        assert (await client.get(f"/timeline/{MODEL}")).json() == []


async def test_no_job_is_begun_once_the_service_drains(home: Path, tracking_uri: str) -> None:
    app = create_app(EvaluatorSettings())
    before = set(threading.enumerate())
    async with asgi_client(app):
        (worker,) = (each for each in set(threading.enumerate()) - before if each.name.startswith("jobs-"))
        app.readiness.drain()
        await asyncio.to_thread(worker.join, 30)
        assert not worker.is_alive()
