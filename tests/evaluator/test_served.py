"""What people would be told, counted: by hand, as inference tells it, and for versions that older releases judged."""

import asyncio
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from medloop.bundle import Bundle, Conformal
from medloop.data.manifest import Manifest
from medloop.registry import TAG_DIGEST, Registry, Version
from medloop.schemas import EvaluationReport, PredictionBatch, ServedReport
from medloop.storage.objects import ObjectStore
from medloop.testing import asgi_client, tiny_bundle
from medloop_evaluator.answers import Answers, evaluation_key
from medloop_evaluator.metrics import Scorer
from medloop_evaluator.resample import Resampling, wilson
from medloop_evaluator.served import make_served
from medloop_inference.app import create_app
from medloop_inference.settings import ServingSettings, Settings

MODEL = "tiny"
RegisterVersion = Callable[..., Version]


def bundle_of(folder: Path, outlier_threshold: float | None) -> Bundle:
    """Sets hold classes of at least .4, else as many as reach .75."""
    bundle = tiny_bundle(folder, classes=("a", "b", "c"), outlier_threshold=outlier_threshold)
    conformal = Conformal(coverage=0.75, threshold=0.6, images=40)
    return replace(bundle, card=bundle.card.model_copy(update={"conformal": conformal}))


def served(bundle: Bundle, groups: np.ndarray | None = None) -> ServedReport:
    """Six images: their probabilities, label, set, and what speaks for a referral."""
    told: list[tuple[list[float], int, float]] = [
        ([0.70, 0.20, 0.10], 0, 0.1),  # {a}
        ([0.46, 0.44, 0.10], 1, 0.1),  # {a, b}: ambiguous
        ([0.34, 0.33, 0.33], 2, 0.95),  # none of .4, filled to {a, b, c}: ambiguous, and beyond .9
        ([0.10, 0.80, 0.10], 2, 0.1),  # {b}, wrong
        ([0.10, 0.85, 0.05], 1, 0.95),  # {b}: beyond .9
        ([0.39, 0.37, 0.24], 2, 0.1),  # none of .4, filled to {a, b}: ambiguous, c is not in it
    ]
    probabilities = np.array([row for row, _, _ in told], np.float32)
    labels = np.array([label for _, label, _ in told])
    answers = Answers(np.arange(6), probabilities, np.array([score for _, _, score in told], np.float32))
    scorer = Scorer(probabilities, labels, bundle.card.classes)
    return make_served(answers, scorer, bundle, Resampling(labels, groups))


def test_counted_by_hand(tmp_path: Path) -> None:
    found = served(bundle_of(tmp_path, 0.9))
    assert (found.nominal_coverage, found.calibration_images) == (0.75, 40)
    shares = {
        "coverage": (4, 6),
        "referred": (4, 6),
        "referred_ambiguous": (3, 6),
        "referred_unlike_training": (2, 6),
        "accepted_accuracy": (1, 2),
        "referred_accuracy": (1, 4),
    }
    assert found.figures.keys() == {*shares, "set_size"}
    for name, (hits, images) in shares.items():
        figure = found.figures[name]
        assert (figure.value, figure.low, figure.high, figure.method) == (
            hits / images,
            *wilson(hits, images),
            "wilson",
        )
    assert found.set_sizes == [0, 3, 2, 1]
    size = found.figures["set_size"]
    assert size.value == pytest.approx(10 / 6)
    assert 1 <= size.low < 10 / 6 < size.high <= 3
    assert {name: figure.value for name, figure in found.class_coverage.items()} == {"a": 1, "b": 1, "c": 1 / 3}
    assert (found.class_coverage["c"].low, found.class_coverage["c"].high) == wilson(1, 3)


def test_without_an_outlier_threshold_that_reason_has_no_rate(tmp_path: Path) -> None:
    found = served(bundle_of(tmp_path, None))
    assert "referred_unlike_training" not in found.figures
    assert found.figures["referred"].value == found.figures["referred_ambiguous"].value == 0.5


def test_groups_change_the_method_of_every_interval(tmp_path: Path) -> None:
    found = served(bundle_of(tmp_path, 0.9), groups=np.array([0, 0, 1, 1, 2, 2]))
    every = {**found.figures, **found.class_coverage}.values()
    assert {figure.method for figure in every} <= {"cluster-bootstrap", "cluster-wilson"}
    assert found.figures["coverage"].value == 4 / 6


async def evaluated(client: httpx.AsyncClient) -> ServedReport:
    job = (await client.post("/evaluate", json={"model": MODEL, "version": "1"})).json()
    async with asyncio.timeout(60):
        while job["status"] not in ("succeeded", "failed"):
            await asyncio.sleep(0.05)
            job = (await client.get(f"/jobs/{job['id']}")).json()
    assert job["status"] == "succeeded", job
    report = EvaluationReport.model_validate((await client.get(f"/reports/{MODEL}/1")).json())
    assert report.served is not None
    return report.served


async def predicted(images: list[bytes]) -> PredictionBatch:
    """What the service itself answers, once it serves its champion."""
    settings = Settings(serving=ServingSettings(model=MODEL, engine_threads=1))
    async with asgi_client(create_app(settings)) as inference, asyncio.timeout(60):
        while (await inference.get("/readyz")).status_code != 200:
            await asyncio.sleep(0.05)
        files = [("file", (f"{n}.png", data, "image/png")) for n, data in enumerate(images)]
        return PredictionBatch.model_validate((await inference.post("/v1/predict", files=files)).json())


@pytest.mark.anyio
async def test_the_report_counts_what_inference_answers(
    client: httpx.AsyncClient, register: RegisterVersion, dataset: Manifest, objects: ObjectStore, registry: Registry
) -> None:
    version = register(bias=2.0, threshold=0.3, outlier_threshold=0.7)
    found = await evaluated(client)
    await client.post("/approvals", json={"model": MODEL, "version": "1", "approver": "Dr A"})
    rows = [row for row in dataset.rows if row.split == "test"]
    batch = await predicted([objects.get(row.location) for row in rows])
    told = [(row.label, item.prediction) for row, item in zip(rows, batch.items, strict=True) if item.prediction]
    assert len(told) == len(rows)

    counts: dict[str, list[int]] = {
        "coverage": [label in one.prediction_set for label, one in told],
        "referred": [one.decision == "refer" for _, one in told],
        "referred_ambiguous": ["ambiguous" in one.reasons for _, one in told],
        "referred_unlike_training": ["unlike-training" in one.reasons for _, one in told],
        "accepted_accuracy": [label == one.label for label, one in told if one.decision == "accept"],
        "referred_accuracy": [label == one.label for label, one in told if one.decision == "refer"],
        "set_size": [len(one.prediction_set) for _, one in told],
    }
    assert {name: figure.value for name, figure in found.figures.items()} == pytest.approx(
        {name: np.mean(values) for name, values in counts.items()}
    )
    assert found.set_sizes == np.bincount(counts["set_size"], minlength=3).tolist()
    for name in ("coverage", "referred_ambiguous", "referred_unlike_training", "accepted_accuracy"):
        assert 0 < found.figures[name].value < 1, f"{name}: these images would not tell a wrong rule"
    assert found.nominal_coverage == told[0][1].coverage
    metrics = registry.client.get_run(version.run_id).data.metrics
    for name, figure in found.figures.items():
        assert (metrics[f"test_{name}"], metrics[f"test_{name}_high"]) == (figure.value, figure.high)


def test_an_older_report_is_still_read() -> None:
    document = {
        "schema_version": 1,
        "model": {"name": "m", "version": "1", "run_id": "r", "dataset_id": "d", "bundle_digest": "b"},
        "split": "test",
        "images": 2,
        "classes": ["a", "b"],
        "metrics": {"accuracy": {"value": 1.0, "low": 0.34, "high": 1.0, "method": "wilson"}},
        "per_class": [],
        "confusion": [[1, 0], [0, 1]],
        "worst": [],
        "leaks": {},
        "created_at": "2026-11-20T10:00:00Z",
    }
    assert EvaluationReport.model_validate_json(json.dumps(document)).served is None


@pytest.mark.anyio
async def test_what_an_older_release_judged_is_shown_and_on_request_judged_again(
    client: httpx.AsyncClient, register: RegisterVersion, dataset: Manifest, objects: ObjectStore
) -> None:
    version = register()
    first = await evaluated(client)
    # As that release kept it: a report without this part, and answers without outlier scores.
    report, answers = (
        evaluation_key(version.tags[TAG_DIGEST], dataset.id, "test", name) for name in ("report.json", "answers.npz")
    )
    document = json.loads(objects.get(report))
    del document["served"]
    objects.put(report, json.dumps(document).encode())
    kept, buffer = Answers.from_npz(objects.get(answers)), io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, rows=kept.rows, probabilities=kept.probabilities)
    objects.put(answers, buffer.getvalue())

    shown = await client.get(f"/reports/{MODEL}/1")
    assert (shown.status_code, shown.json()["served"]) == (200, None)
    assert await evaluated(client) == first
