"""The HTTP API: parses, calls and returns."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Depends, FastAPI, File, Form, Query, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from medloop.errors import InvalidRequest, MedLoopError, UnsupportedImage
from medloop.http import Readiness, problem
from medloop.http import create_app as create_base
from medloop.log import request_id
from medloop.registry import Registry
from medloop.schemas import Correction, Person, Prediction, PredictionBatch, PredictionItem, ServedModel
from medloop.storage.objects import ObjectStore, open_objects
from medloop.storage.records import RecordStore, open_records
from prometheus_client import CollectorRegistry
from pydantic import UUID7
from starlette.datastructures import UploadFile as FormFile
from starlette.requests import ClientDisconnect

from medloop_inference.background import Neighbours, Periodic
from medloop_inference.champion import Watcher
from medloop_inference.corrections import Corrections, Submission
from medloop_inference.metrics import Metrics, ServingState
from medloop_inference.predict import Predictor
from medloop_inference.recorder import Recorder
from medloop_inference.settings import Settings

NEIGHBOUR_SECONDS = 10.0
"""Between two looks at whether objects and records answer."""
_MULTIPART = "multipart/form-data"
_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_PREDICT_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "image/*": _BINARY,
        "application/octet-stream": _BINARY,
        _MULTIPART: {
            "schema": {"type": "object", "properties": {"files": {"type": "array", "items": _BINARY["schema"]}}}
        },
    },
}


class Service:
    """The parts of one running inference service."""

    def __init__(self, settings: Settings, readiness: Readiness, metrics: CollectorRegistry) -> None:
        self.objects: ObjectStore = open_objects(settings.storage.objects_url)
        self.records: RecordStore = open_records(settings.storage.records_url)
        self.watcher = Watcher(
            settings.serving.model,
            Registry(settings.tracking.tracking_uri),
            settings.home,
            threads=settings.serving.engine_threads,
            report=lambda reason: readiness.passed() if reason is None else readiness.failed(reason),
        )
        self.metrics = Metrics(metrics)
        self.predictor = Predictor(os.cpu_count() or 1, self.metrics.observe)
        self.recorder = Recorder(self.records)
        self.corrections = Corrections(settings.serving.model, self.objects, self.records)
        self.neighbours = Neighbours({"objects": self.objects.ping, "records": self.records.ping})
        metrics.register(ServingState(self.watcher, self.recorder))
        self._background = [
            Periodic("champion watcher", self.watcher.poll_once, settings.serving.poll_seconds),
            Periodic("neighbours", self.neighbours.check_once, NEIGHBOUR_SECONDS),
        ]

    def start(self) -> None:
        self.recorder.start()
        for work in self._background:
            work.start()

    def stop(self) -> None:
        for work in self._background:
            work.stop()
        self.recorder.stop()
        self.records.close()

    @property
    def degraded(self) -> dict[str, str]:
        recording = {"records": self.recorder.problem} if self.recorder.problem else {}
        return self.neighbours.degraded | recording | self.watcher.degraded

    def settle(self, answer: Prediction | MedLoopError) -> None:
        """Count an answer or a refusal; an answer is also recorded."""
        if isinstance(answer, MedLoopError):
            self.metrics.refused(answer.code)
        else:
            self.metrics.answered(answer)
            self.recorder.offer(answer, request_id.get())


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Parts = Annotated[Service, Depends(_service)]
Limit = Annotated[int, Query(ge=1, le=1000)]

router = APIRouter(prefix="/v1", tags=["inference"])


@router.post(
    "/predict",
    summary="Answer for one image (raw body) or for many (multipart), each on its own",
    response_model=Prediction | PredictionBatch,
    openapi_extra={"requestBody": _PREDICT_BODY},
)
async def predict(request: Request, parts: Parts) -> Prediction | PredictionBatch:
    served = parts.watcher.served()
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == _MULTIPART:
        images = await _read_files(request)
        answers = await parts.predictor.predict_many(served, images)
        for answer in answers:
            parts.settle(answer)
        return PredictionBatch(items=[_item(index, answer) for index, answer in enumerate(answers)])
    if not content_type.startswith("image/") and content_type != "application/octet-stream":
        raise UnsupportedImage(
            "Send the image file as the body, with Content-Type image/* or application/octet-stream, "
            f"or several files as {_MULTIPART}."
        )
    try:
        prediction = await parts.predictor.predict(served, await _read_body(request))
    except MedLoopError as exc:
        parts.settle(exc)
        raise
    parts.settle(prediction)
    return prediction


@router.get("/model", summary="What is served, what was refused and why, and what is out of reach")
async def served_model(parts: Parts) -> ServedModel:
    return parts.watcher.describe().model_copy(update={"degraded": parts.degraded})


@router.post(
    "/predictions/{prediction_id}/correction",
    summary="Store a person's label for a predicted image",
    status_code=201,
    responses={200: {"model": Correction, "description": "The same correction was there already"}},
)
async def correct(
    prediction_id: UUID7,
    label: Annotated[str, Form(min_length=1, max_length=200)],
    author: Annotated[Person, Form()],
    parts: Parts,
    response: Response,
    comment: Annotated[str, Form(max_length=2000)] = "",
    image: Annotated[UploadFile | None, File()] = None,
) -> Correction:
    served = parts.watcher.current
    if served is not None and label not in served.bundle.card.classes:
        choices = ", ".join(served.bundle.card.classes)
        raise RequestValidationError([{"loc": ("body", "label"), "msg": f"choose one of: {choices}", "type": "enum"}])
    data = await image.read() if image is not None else None
    submission = Submission(prediction_id, label, author, comment, data)
    correction, new = await to_thread.run_sync(parts.corrections.submit, submission)
    response.status_code = 201 if new else 200
    return correction


@router.get("/corrections", summary="Corrections, those of the newest predictions first")
def corrections(
    parts: Parts, status: Literal["pending", "accepted", "rejected"] | None = None, limit: Limit = 100
) -> list[Correction]:
    return parts.corrections.recent(status, limit)


@router.get("/predictions", summary="Recorded predictions, newest first")
def predictions(parts: Parts, limit: Limit = 100) -> list[Prediction]:
    found = parts.records.find("predictions", limit=limit)
    return [Prediction.model_validate(record.document) for record in found.items]


async def _read_body(request: Request) -> bytes:
    try:
        return await request.body()
    except ClientDisconnect as exc:
        raise InvalidRequest("The connection ended before the whole body had arrived; send it again.") from exc


async def _read_files(request: Request) -> list[bytes]:
    """All files of a multipart body, whatever their fields are called; raises InvalidRequest if there is none."""
    try:
        async with request.form() as form:
            values = [value for _, value in form.multi_items()]
            images = [await value.read() for value in values if isinstance(value, FormFile)]
    except ClientDisconnect as exc:
        raise InvalidRequest("The connection ended before the whole body had arrived; send it again.") from exc
    if not images or len(images) < len(values):
        raise InvalidRequest(
            "Every part of a multipart request must be an image file, with a filename; send at least one."
        )
    return images


def _item(index: int, answer: Prediction | MedLoopError) -> PredictionItem:
    if isinstance(answer, MedLoopError):
        return PredictionItem(index=index, problem=problem(answer))
    return PredictionItem(index=index, prediction=answer)


def create_app(settings: Settings) -> FastAPI:
    """The inference service; its parts are in `app.state.service` and run while its lifespan does."""
    readiness = Readiness()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service: Service = app.state.service
        service.start()
        try:
            yield
        finally:
            await to_thread.run_sync(service.stop)

    app = create_base(
        "inference", settings.server, routers=[router], readiness=readiness, lifespan=lifespan, auth=settings.auth
    )
    app.state.service = Service(settings, readiness, app.state.metrics)
    return app
