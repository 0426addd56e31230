"""Stand-ins of the services, small and live: what they are asked is kept, what they answer is told to them."""

import base64
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, File, Form, Query, Request, UploadFile
from medloop.errors import Conflict, MedLoopError
from medloop.http import problem
from medloop.outliers import decide
from medloop.schemas import (
    Approval,
    ApprovalCreate,
    Attribution,
    ClassActivation,
    Correction,
    Explanation,
    GateCreate,
    GateDecision,
    ModelRef,
    Outlier,
    Prediction,
    PredictionBatch,
    PredictionItem,
    RollbackCreate,
    ServedModel,
    TimelineEntry,
    new_id,
)
from medloop.vision.decode import decode
from medloop.vision.dicom import decode_dicom, is_dicom
from medloop.vision.encode import encode_png

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
    shown: list[bytes] = field(default_factory=list)
    """The images that were to be explained."""
    corrections: list[Correction] = field(default_factory=list)
    corrected: list[bytes] = field(default_factory=list)
    """The images that came with corrections."""
    approvals: list[ApprovalCreate] = field(default_factory=list)
    rollbacks: list[RollbackCreate] = field(default_factory=list)
    refuse: MedLoopError | None = None
    """Raised by prediction, explanation and correction."""
    outcome: str = "pass"
    cam: bool = True
    """Whether the network has class activation maps."""
    outliers: bool = True
    """Whether the bundle has statistics of its training images."""
    warnings: list[str] = field(default_factory=list)
    served: ServedModel = field(
        default_factory=lambda: ServedModel(
            model=REF, classes=list(CLASSES), loaded_at=datetime(2026, 1, 2, tzinfo=UTC)
        )
    )

    def answer(self, data: bytes, explain: str | None) -> Prediction:
        """Bright images are "bright", what the tiny bundle says, near enough; black ones are unlike its images."""
        self.predicted.append(data)
        pixels = decode_dicom(data).pixels if is_dicom(data) else decode(data).pixels
        bright = float(pixels.mean()) / 255
        probabilities = {"dark": 1 - bright, "bright": bright}
        label = "bright" if bright >= 0.5 else "dark"
        kept = [label] if max(probabilities.values()) > 0.9 else ["bright", "dark"]
        outlier = Outlier(score=1 - bright, percentile=100 * (1 - bright), threshold=0.95) if self.outliers else None
        decision, reasons = decide(kept, outlier)
        overlay = base64.b64encode(encode_png(np.zeros((64, 64, 3), np.uint8))).decode()
        return Prediction(
            model=REF,
            image_hash="a" * 64,
            label=label,
            probabilities=probabilities,
            prediction_set=kept,
            coverage=0.95,
            outlier=outlier,
            decision=decision,
            reasons=reasons,
            cam=ClassActivation(label=label, grid=[[0.0] * 4] * 4, overlay=overlay)
            if self.cam and explain == "cam"
            else None,
            warnings=self.warnings,
            milliseconds={"decode": 1.0, "network": 2.0, "total": 3.5},
        )


def _inference(fakes: Fakes) -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.post("/predict")
    async def predict(files: Annotated[list[UploadFile], File()], explain: str | None = None) -> PredictionBatch:
        if fakes.refuse:
            raise fakes.refuse
        items = []
        for index, file in enumerate(files):
            try:
                items.append(PredictionItem(index=index, prediction=fakes.answer(await file.read(), explain)))
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
        fakes.corrected.append(await image.read())
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
        fakes.shown.append(await request.body())
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


def routers(fakes: Fakes) -> list[APIRouter]:
    """The API of all three, to be served at one address."""
    return [_inference(fakes), _explainer(fakes), _evaluator(fakes)]


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
