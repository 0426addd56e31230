"""The loop as a whole: what the demo prints, and what approve, rollback and tampering change."""

import csv
import io
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from medloop.bundle import MODEL
from medloop.clients import InferenceClient
from medloop.data.manifest import load_manifest
from medloop.registry import CHALLENGER, CHAMPION, PREVIOUS
from medloop.schemas import ServedModel
from medloop.storage.objects import open_objects

from .conftest import RunningStack

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]  # the first test waits for the whole demo

FOLLOW_SECONDS = 120


def served(stack: RunningStack) -> ServedModel:
    with InferenceClient(stack.addresses["inference"]) as inference:
        return inference.served_model()


def served_version(stack: RunningStack) -> str:
    model = served(stack).model
    return model.version if model else ""


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + FOLLOW_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def a_test_image(stack: RunningStack) -> bytes:
    objects = open_objects((stack.home / "objects").as_uri())
    manifest = load_manifest(objects, stack.document["dataset"]["id"])
    return objects.get(manifest.of("test")[0].location)


@pytest.fixture(scope="module")
def second(stack: RunningStack) -> str:
    """A second version of the same model, trained from another seed."""
    made = stack.medloop("train", stack.model, "--epochs", "1", "--seed", "7")
    return str(made["version"])


def test_the_demo_prints_what_scripts_read(stack: RunningStack) -> None:
    document = stack.document
    assert document["dataset"]["images"] > 1000
    assert len(document["dataset"]["classes"]) == 6
    assert document["dataset"]["leaks"]["exact"] == 0
    assert document["dataset"]["leaks"]["near"] >= 0
    assert document["metrics"].keys() == {"accuracy", "auc", "ece"}
    assert document["metrics"]["accuracy"] > 0.5  # far above the 1/6 of guessing, after two short epochs
    assert document["model"] == {"name": stack.model, "version": "1", "alias": "champion"}
    assert document["addresses"].keys() == {"inference", "evaluator", "explainer", "dashboard", "mlflow"}
    assert document["seconds"]["train"] > 0


def test_status_finds_everything_ready(stack: RunningStack) -> None:
    services = stack.medloop("status")["services"]
    assert {name for name, service in services.items() if service["ready"]} == services.keys()


def test_curl_gets_an_answer(stack: RunningStack, tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    image.write_bytes(a_test_image(stack))
    address = f"{stack.addresses['inference']}/v1/predict"
    response = httpx.post(address, content=image.read_bytes(), headers={"content-type": "image/png"})
    assert response.status_code == 200
    answer = response.json()
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert answer["label"] in answer["prediction_set"]
    assert answer["model"]["version"] == served_version(stack)
    by_command = stack.medloop("predict", str(image))["predictions"][0]["prediction"]
    assert by_command["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-6)


def test_the_served_model_answers_as_the_evaluator_recorded(stack: RunningStack, tmp_path: Path) -> None:
    registry = stack.registry
    version = registry.version(stack.model, "1")
    path = registry.client.download_artifacts(version.run_id, "evaluation/test/predictions.csv", str(tmp_path))
    recorded = list(csv.DictReader(io.StringIO(Path(path).read_text())))
    objects = open_objects((stack.home / "objects").as_uri())
    manifest = load_manifest(objects, stack.document["dataset"]["id"])
    assert len(recorded) == len(manifest.of("test"))
    wait_for(lambda: served_version(stack) == "1", "version 1 is served")
    differences: list[float] = []
    with InferenceClient(stack.addresses["inference"]) as inference:
        for start in range(0, 96, 32):
            rows = recorded[start : start + 32]
            images = [objects.get(manifest.rows[int(row["row"])].location) for row in rows]
            for row, item in zip(rows, inference.predict_many(images).items, strict=True):
                assert item.prediction is not None
                differences += [abs(float(row[f"p_{c}"]) - p) for c, p in item.prediction.probabilities.items()]
    assert np.max(differences) <= 1e-4


def test_approve_and_rollback_change_the_answering_model_without_a_restart(stack: RunningStack, second: str) -> None:
    before = stack.medloop("status")["services"]
    assert served_version(stack) == "1"
    stack.medloop("evaluate", stack.model, second)
    approved = stack.medloop("approve", stack.model, second, "--approver", "Ada", "--override", "a test of the swap")
    assert (approved["version"], approved["approver"]) == (second, "Ada")
    wait_for(lambda: served_version(stack) == second, "the approved version is served")
    assert stack.registry.at_alias(stack.model, CHALLENGER) is None
    stack.medloop("rollback", stack.model, "--approver", "Ada", "--reason", "a test")
    wait_for(lambda: served_version(stack) == "1", "the version before is served again")
    previous = stack.registry.at_alias(stack.model, PREVIOUS)
    assert previous is not None
    assert previous.version == second
    assert stack.medloop("status")["services"] == before


def test_an_alias_moved_by_hand_changes_nothing_and_says_why(stack: RunningStack, second: str) -> None:
    """Version 2 was approved once: an old approval must not be enough."""
    stack.registry.set_alias(stack.model, CHAMPION, second)
    try:
        wait_for(lambda: any(r.version == second for r in served(stack).refused), "the refusal is shown")
        refused = next(r for r in served(stack).refused if r.version == second)
        assert "approval" in refused.reason
        assert served_version(stack) == "1"
    finally:
        stack.registry.set_alias(stack.model, CHAMPION, "1")


def test_a_bundle_with_one_byte_changed_is_not_approved(stack: RunningStack) -> None:
    made = stack.medloop("train", stack.model, "--epochs", "1", "--seed", "8")
    artifacts = stack.home / "mlflow" / "artifacts"
    [network] = [path for path in artifacts.rglob(MODEL) if made["run_id"] in path.parts]
    data = bytearray(network.read_bytes())
    data[len(data) // 2] ^= 1
    network.write_bytes(data)
    refused = stack.medloop("approve", stack.model, made["version"], "--approver", "Ada", check=False)
    assert refused["status"] == 8
    assert "SHA-256" in refused["error"]["detail"]
    assert served_version(stack) == "1"


def test_a_second_demo_from_the_same_home_is_refused_in_one_sentence(stack: RunningStack) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "medloop.cli", "demo"],
        env=stack.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 7
    assert "already runs" in done.stderr
    assert "Traceback" not in done.stderr
