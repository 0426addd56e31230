"""Small live stand-ins for the services, a registry with one finished run, and pages that talk to both."""

import base64
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import streamlit as st
from fastapi import APIRouter, File, Form, Query, Request, UploadFile
from medloop.data.leaks import LeakCount, LeakReport
from medloop.data.manifest import Manifest, Row, Split
from medloop.errors import Conflict, MedLoopError
from medloop.http import Readiness, create_app, problem
from medloop.registry import CHALLENGER, CHAMPION, PREVIOUS, Registry, Version
from medloop.schemas import (
    Approval,
    ApprovalCreate,
    Attribution,
    ClassReport,
    Correction,
    Estimate,
    EvaluationReport,
    ExplainedBy,
    ExplainedImage,
    Explanation,
    ExplanationIndex,
    GateCreate,
    GateDecision,
    Mistake,
    ModelRef,
    Prediction,
    PredictionBatch,
    PredictionItem,
    RollbackCreate,
    ServedModel,
    TimelineEntry,
    new_id,
)
from medloop.settings import ServerSettings
from medloop.storage.objects import ObjectStore, open_objects
from medloop.testing import live_server, register_bundle, tiny_bundle
from medloop.vision.decode import decode
from medloop.vision.encode import encode_png
from medloop_dashboard.screens import elements
from streamlit.testing.v1 import AppTest

CLASSES = ("dark", "bright")
REF = ModelRef(name="tiny", version="1", run_id="0" * 32, dataset_id="0" * 64, bundle_digest="d" * 64)
PNG = encode_png(np.full((16, 16, 1), 200, np.uint8))
QUALITY = {"completeness_gap": 0.01, "deletion": 0.3, "random_deletion": 0.6, "faithfulness": 0.3}
HOSTILE = "<script>alert(1)</script> ![x](http://127.0.0.1/x.png) :red[r] **b**"
"""What a person may type, none of which may mean anything to a browser."""


@dataclass
class Fakes:
    """The services' state: what they were asked, and what they are to answer."""

    url: str = ""
    predicted: list[bytes] = field(default_factory=list)
    explained: list[dict[str, str]] = field(default_factory=list)
    corrections: list[Correction] = field(default_factory=list)
    approvals: list[ApprovalCreate] = field(default_factory=list)
    rollbacks: list[RollbackCreate] = field(default_factory=list)
    refuse: MedLoopError | None = None
    """Raised by prediction, explanation and correction."""
    outcome: str = "pass"
    served: ServedModel = field(
        default_factory=lambda: ServedModel(
            model=REF, classes=list(CLASSES), loaded_at=datetime(2026, 1, 2, tzinfo=UTC)
        )
    )

    def answer(self, data: bytes) -> Prediction:
        """Bright images are "bright": what the tiny bundle says, near enough."""
        self.predicted.append(data)
        bright = float(decode(data).pixels.mean()) / 255
        probabilities = {"dark": 1 - bright, "bright": bright}
        label = "bright" if bright >= 0.5 else "dark"
        return Prediction(
            model=REF,
            image_hash="a" * 64,
            label=label,
            probabilities=probabilities,
            prediction_set=[label] if max(probabilities.values()) > 0.9 else ["bright", "dark"],
            coverage=0.95,
            milliseconds={"decode": 1.0, "network": 2.0, "total": 3.5},
        )


def _inference(fakes: Fakes) -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.post("/predict")
    async def predict(files: Annotated[list[UploadFile], File()]) -> PredictionBatch:
        if fakes.refuse:
            raise fakes.refuse
        items = []
        for index, file in enumerate(files):
            try:
                items.append(PredictionItem(index=index, prediction=fakes.answer(await file.read())))
            except MedLoopError as error:
                items.append(PredictionItem(index=index, problem=problem(error)))
        return PredictionBatch(items=items)

    @router.get("/model")
    async def model() -> ServedModel:
        return fakes.served

    @router.post("/predictions/{prediction_id}/correction", status_code=201)
    async def correct(
        prediction_id: str,
        label: Annotated[str, Form()],
        author: Annotated[str, Form()],
        image: Annotated[UploadFile, File()],
        comment: Annotated[str, Form()] = "",
    ) -> Correction:
        if fakes.refuse:
            raise fakes.refuse
        stored = correction(prediction_id=prediction_id, label=label, author=author, comment=comment)
        fakes.corrections.insert(0, stored)
        return stored

    @router.get("/corrections")
    async def corrections(status: str | None = None, limit: int = 100) -> list[Correction]:
        return [c for c in fakes.corrections if status in (None, c.status)][:limit]

    return router


def _explainer(fakes: Fakes) -> APIRouter:
    router = APIRouter()

    @router.post("/explain")
    async def explain(request: Request, model: str, version: str, target: Annotated[str, Query()]) -> Explanation:
        if fakes.refuse:
            raise fakes.refuse
        fakes.explained.append({"model": model, "version": version, "target": target})
        overlay = base64.b64encode(encode_png(np.zeros((64, 64, 3), np.uint8))).decode()
        return Explanation(
            model=REF,
            image_hash="a" * 64,
            target=target,
            probability=0.8,
            attributions=[
                Attribution(method="integrated-gradients", overlay=overlay, values=[[0.0]], quality=QUALITY),
                Attribution(method="shap", overlay=overlay, values=[[0.0]], quality=QUALITY),
            ],
        )

    return router


def _evaluator(fakes: Fakes) -> APIRouter:
    router = APIRouter()

    @router.post("/gate")
    async def gate(asked: GateCreate) -> GateDecision:
        return decision(asked.version, fakes.outcome)

    @router.post("/approvals", status_code=201)
    async def approve(asked: ApprovalCreate) -> Approval:
        if fakes.outcome == "fail" and not asked.override:
            raise Conflict("The gate failed; give a reason to override it.")
        fakes.approvals.append(asked)
        return approval("approve", asked.version, asked.approver, asked.override or "")

    @router.post("/rollback", status_code=201)
    async def rollback(asked: RollbackCreate) -> Approval:
        fakes.rollbacks.append(asked)
        return approval("rollback", "1", asked.approver, asked.reason)

    @router.get("/timeline/{model}")
    async def timeline(model: str) -> list[TimelineEntry]:
        return [
            TimelineEntry(approval=approval("approve", "2", "Ada", HOSTILE), decision=decision("2", "pass")),
            TimelineEntry(approval=approval("bootstrap", "1", "bootstrap", ""), decision=None),
        ]

    return router


def decision(version: str, outcome: Any) -> GateDecision:
    reason = f"Version {version} was compared on 40 images."
    return GateDecision(
        model="tiny", challenger=version, champion="2", dataset_id="0" * 64, outcome=outcome, reason=reason
    )


def approval(action: Any, version: str, approver: str, reason: str) -> Approval:
    return Approval(
        sequence=3,
        action=action,
        model="tiny",
        version=version,
        bundle_digest="d" * 64,
        decision_id=new_id(),
        approver=approver,
        reason=reason,
        key_id="0123456789abcdef",
    )


def correction(**changes: Any) -> Correction:
    values: dict[str, Any] = {
        "id": new_id(),
        "prediction_id": new_id(),
        "model": "tiny",
        "version": "1",
        "predicted_label": "bright",
        "label": "dark",
        "image_hash": "a" * 64,
        "author": "Ada",
    }
    return Correction(**(values | changes))


@pytest.fixture(scope="session")
def fake_services() -> Iterator[Fakes]:
    """All three services at one address, over real HTTP."""
    fakes = Fakes()
    readiness = Readiness()
    readiness.passed()
    app = create_app(
        "fakes",
        ServerSettings(),
        routers=[_inference(fakes), _explainer(fakes), _evaluator(fakes)],
        readiness=readiness,
    )
    with live_server(app) as url:
        fakes.url = url
        yield fakes


@pytest.fixture
def fakes(fake_services: Fakes, home: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """The stand-ins, fresh, with the dashboard's environment pointing at them."""
    for member in fields(Fakes):
        if member.name != "url":
            setattr(fake_services, member.name, getattr(Fakes(), member.name))
    for service in ("INFERENCE", "EVALUATOR", "EXPLAINER"):
        monkeypatch.setenv(f"MEDLOOP_{service}_URL", fake_services.url)
    return fake_services


@pytest.fixture
def page(fakes: Fakes) -> Iterator[Callable[[str], AppTest]]:
    """Makes a page of the dashboard by its module's name; every test has clients and caches of its own."""

    def make(name: str) -> AppTest:
        st.cache_data.clear()
        elements.connections.clear()
        script = f"from medloop_dashboard.screens import {name}\n{name}.show()"
        return AppTest.from_string(script, default_timeout=60)

    yield make
    st.cache_data.clear()
    elements.connections.clear()


def make_manifest(objects: ObjectStore) -> Manifest:
    """A stored data set version of 40 images with one exact leak."""
    splits: tuple[Split, ...] = ("train", "train", "val", "calibration", "test")
    rows = tuple(
        Row(
            byte_hash=f"{i:064x}",
            # Images 0 and 4 hold the same pixels: one for training, one for the test.
            pixel_hash=f"{0 if i == 4 else i:064x}",
            label=CLASSES[i % 2],
            split=splits[i % 5],
        )
        for i in range(40)
    )
    made = Manifest("tiny", CLASSES, rows)
    made.save(objects)
    count = LeakCount(exact=1, near=1)
    leaks = LeakReport(
        distance=2, images=40, exact=1, near=1, by_split={"train/test": count}, by_class={"dark": count}, examples=()
    )
    objects.put(f"datasets/{made.id}/leaks.json", leaks.to_json().encode())
    return made


@pytest.fixture
def manifest(objects: ObjectStore) -> Manifest:
    return make_manifest(objects)


@dataclass(frozen=True)
class Studio:
    """An MLflow and an object store with three versions of model `tiny`, only ever read: 1 was champion before, 2 is,
    3 waits; 3 was trained, evaluated and explained."""

    database: Path
    objects: Path
    versions: list[Version]
    manifest: Manifest

    @property
    def tracking_uri(self) -> str:
        return f"sqlite:///{self.database}"


@pytest.fixture(scope="session")
def finished(tracking_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    folder = tmp_path_factory.mktemp("studio")
    database = folder / "mlflow.sqlite"
    shutil.copy(tracking_template, database)
    registry = Registry(f"sqlite:///{database}")
    registry.client.create_experiment("test", artifact_location=(folder / "artifacts").as_uri())
    manifest = make_manifest(open_objects((folder / "objects").as_uri()))
    bundles = [tiny_bundle(folder / f"{n}", bias=float(n), dataset_id=manifest.id) for n in (1, 2, 3)]
    versions = [register_bundle(registry, bundle) for bundle in bundles]
    for alias, version in ((PREVIOUS, "1"), (CHAMPION, "2"), (CHALLENGER, "3")):
        registry.set_alias("tiny", alias, version)
    finish_run(registry, versions[2], manifest, folder / "files")
    return Studio(database, folder / "objects", versions, manifest)


@pytest.fixture
def studio(finished: Studio, home: Path, monkeypatch: pytest.MonkeyPatch) -> Studio:
    """The studio, named in the environment."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", finished.tracking_uri)
    monkeypatch.setenv("MEDLOOP_OBJECTS_URL", finished.objects.as_uri())
    return finished


def finish_run(registry: Registry, version: Version, manifest: Manifest, folder: Path) -> None:
    """Give a run what trainer and evaluator leave in it."""
    from mlflow.entities import Metric, Param

    curves = {"train_loss": [0.9, 0.5, 0.2], "val_loss": [1.0, 0.6, 0.4], "val_accuracy": [0.5, 0.8, 0.9]}
    metrics = [Metric(name, v, 1000 + i, i) for name, values in curves.items() for i, v in enumerate(values)]
    report = evaluation_report(version, manifest)
    for name, estimate in report.metrics.items():
        ends = (("", estimate.value), ("_low", estimate.low), ("_high", estimate.high))
        metrics += [Metric(f"test_{name}{end}", value, 2000, 0) for end, value in ends]
    registry.client.log_batch(version.run_id, metrics=metrics, params=[Param("architecture", "tiny")])
    target = folder / "evaluation" / "test"
    (target / "misclassified").mkdir(parents=True)
    (target / "report.json").write_text(report.model_dump_json())
    (target / "misclassified" / "00_dark_as_bright.png").write_bytes(PNG)
    lines = ["row,image_hash,label,predicted,p_dark,p_bright", "0,aa,dark,bright,0.1,0.9", "1,bb,dark,dark,0.7,0.3"]
    (target / "predictions.csv").write_text("\n".join(lines) + "\n")
    explained = folder / "explanations"
    explained.mkdir()
    (explained / "index.json").write_text(explanation_index(report.model).model_dump_json())
    for name in ("00.png", "00_ig.png", "00_shap.png"):
        (explained / name).write_bytes(PNG)
    registry.client.log_artifacts(version.run_id, str(folder))


def explanation_index(ref: ModelRef) -> ExplanationIndex:
    image = ExplainedImage(
        row=0,
        image_hash="a" * 64,
        label="dark",
        predicted="bright",
        probability=0.9,
        original="00.png",
        attributions=[
            ExplainedBy(method="integrated-gradients", overlay="00_ig.png", quality=QUALITY),
            ExplainedBy(method="shap", overlay="00_shap.png", quality=QUALITY),
        ],
    )
    quality = {"integrated-gradients": QUALITY, "shap": QUALITY}
    return ExplanationIndex(model=ref, split="test", images=[image], quality=quality)


def evaluation_report(version: Version, manifest: Manifest) -> EvaluationReport:
    ref = ModelRef(
        name=version.model,
        version=version.version,
        run_id=version.run_id,
        dataset_id=manifest.id,
        bundle_digest="d" * 64,
    )
    return EvaluationReport(
        model=ref,
        split="test",
        images=8,
        classes=list(CLASSES),
        metrics={
            "accuracy": Estimate(value=0.875, low=0.529, high=0.978, method="wilson"),
            "auc": Estimate(value=0.9375, low=0.7, high=1.0, method="bootstrap"),
            "ece": Estimate(value=0.0421, low=0.01, high=0.2, method="bootstrap"),
        },
        per_class=[
            ClassReport(label="dark", support=4, precision=1.0, recall=0.75, f1=0.857, auc=0.9375),
            ClassReport(label="bright", support=4, precision=0.8, recall=1.0, f1=0.889, auc=None),
        ],
        confusion=[[3, 1], [0, 4]],
        worst=[Mistake(row=0, image_hash="a" * 64, label="dark", predicted="bright", probability=0.9)],
        leaks={"exact": 2, "near": 2, "distance": 2},
    )


@pytest.fixture
def hostile() -> str:
    return HOSTILE


@pytest.fixture
def png() -> bytes:
    return PNG


@pytest.fixture
def make_correction() -> Callable[..., Correction]:
    return correction


@pytest.fixture
def texts() -> Callable[[AppTest], str]:
    """Everything that a page says in words, tables included."""

    def read(app: AppTest) -> str:
        kinds = ("title", "subheader", "markdown", "caption", "text", "info", "warning", "error", "success")
        shown: list[Any] = [element for kind in kinds for element in app.get(kind)]
        said = [str(element.value) for element in shown]
        said += [element.proto.title for element in shown if hasattr(element.proto, "title")]
        return "\n".join(said + [table.value.to_csv() for table in app.dataframe])

    return read
