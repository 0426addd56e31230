"""The HTTP API: parses, calls and returns."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Depends, FastAPI, File, Form, Query, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from medloop.auth import check_signed
from medloop.errors import InvalidRequest, MedLoopError, UnsupportedImage
from medloop.http import App, Direct, Readiness, problem, require
from medloop.http import create_app as create_base
from medloop.schemas import Correction, Person, Prediction, PredictionBatch, ServedModel
from pydantic import UUID7
from pydantic_core import to_json
from starlette.datastructures import UploadFile as FormFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from medloop_inference import invocations, oip, stream
from medloop_inference.answer import Options
from medloop_inference.batcher import Outcome
from medloop_inference.corrections import Submission
from medloop_inference.foreign import BINARY, LONGEST_TIMEOUT_MS, check_count, options_of, read_body
from medloop_inference.service import Service
from medloop_inference.settings import Settings

_MULTIPART = "multipart/form-data"
_PREDICT_API: dict[str, Any] = {
    "parameters": [
        {
            "name": "explain",
            "in": "query",
            "required": False,
            "description": "`cam` adds the class activation map.",
            "schema": {"type": "string", "enum": ["cam"]},
        },
        {
            "name": "frame",
            "in": "query",
            "required": False,
            "description": "Which frame of a multi-frame DICOM, counted from 1.",
            "schema": {"type": "integer", "minimum": 1},
        },
        {
            "name": "X-Request-Timeout-Ms",
            "in": "header",
            "required": False,
            "description": "How long the caller waits; what still is queued then is dropped.",
            "schema": {"type": "integer", "minimum": 1, "maximum": LONGEST_TIMEOUT_MS},
        },
    ],
    "requestBody": {
        "required": True,
        "content": {
            "image/*": BINARY,
            "application/dicom": BINARY,
            "application/octet-stream": BINARY,
            _MULTIPART: {
                "schema": {"type": "object", "properties": {"files": {"type": "array", "items": BINARY["schema"]}}}
            },
        },
    },
}


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Parts = Annotated[Service, Depends(_service)]
Limit = Annotated[int, Query(ge=1, le=1000)]

router = APIRouter(prefix="/v1", tags=["inference"])


@router.post(
    "/predict",
    summary="Answer for one image (raw body) or for many (multipart), each on its own",
    dependencies=[require("predict")],
    responses={200: {"model": Prediction | PredictionBatch}},
    openapi_extra=_PREDICT_API,
)
async def predict(request: Request, parts: Parts) -> Response:
    return await _predict(request, parts)


async def _predict(request: Request, parts: Service) -> Response:
    predictor = parts.predictor
    options = _options(request)
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    parts.check_door()  # before the body is read: refusing must cost little
    if content_type == _MULTIPART:
        outcomes = await predictor.predict_many(await _read_files(request), options)
        return _json(_batch(outcomes))
    if not content_type.startswith("image/") and content_type not in ("application/octet-stream", "application/dicom"):
        raise UnsupportedImage(
            "Send the image file as the body, with Content-Type image/*, application/dicom or "
            f"application/octet-stream, or several files as {_MULTIPART}."
        )
    answer = await predictor.predict(await read_body(request), options)
    return _json(answer.json)


@router.get(
    "/model",
    dependencies=[require("predict")],
    summary="What is served, what was refused and why, and what is out of reach",
)
async def served_model(request: Request, parts: Parts) -> ServedModel:
    app: App = request.app
    described = parts.describe()
    return described.model_copy(update={"degraded": described.degraded | app.access.problems})


@router.post(
    "/predictions/{prediction_id}/correction",
    summary="Store a person's label for a predicted image",
    dependencies=[require("correct")],
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
    frame: Annotated[int | None, Form(ge=1, le=2**31 - 1)] = None,
) -> Correction:
    check_signed(author, "author")
    served = parts.watcher.current
    if served is not None and label not in served.bundle.card.classes:
        choices = ", ".join(served.bundle.card.classes)
        raise RequestValidationError([{"loc": ("body", "label"), "msg": f"choose one of: {choices}", "type": "enum"}])
    data = await image.read() if image is not None else None
    correction, new = await parts.correct(Submission(prediction_id, label, author, comment, data, frame))
    response.status_code = 201 if new else 200
    return correction


@router.get(
    "/corrections", dependencies=[require("correct")], summary="Corrections, those of the newest predictions first"
)
async def corrections(
    parts: Parts, status: Literal["pending", "accepted", "rejected"] | None = None, limit: Limit = 100
) -> list[Correction]:
    return await parts.reading.take(lambda: parts.corrections.recent(status, limit), parts.answer_seconds)


@router.get("/predictions", dependencies=[require("predict")], summary="Recorded predictions, newest first")
async def predictions(parts: Parts, limit: Limit = 100) -> list[Prediction]:
    return await parts.reading.take(lambda: parts.recent(limit), parts.answer_seconds)


def _options(request: Request) -> Options:
    """What the query and the headers ask for; raises InvalidRequest."""
    if request.query_params.get("explain", "cam") != "cam":
        raise InvalidRequest("explain can be: cam.")
    return replace(options_of(request), cam="explain" in request.query_params)


async def _read_files(request: Request) -> list[bytes]:
    """All files of a multipart body, whatever their fields are called; raises InvalidRequest if there is none."""
    try:
        async with request.form() as form:
            values = [value for _, value in form.multi_items()]
            images = [await value.read() for value in values if isinstance(value, FormFile)]
    except ClientDisconnect as exc:
        raise InvalidRequest("The connection ended before the whole body had arrived; send it again.") from exc
    except MultiPartException as exc:
        raise InvalidRequest(f"The multipart body cannot be read: {exc.message}") from exc
    if not images or len(images) < len(values):
        raise InvalidRequest(
            "Every part of a multipart request must be an image file, with a filename; send at least one."
        )
    return check_count(images)


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")


def _batch(outcomes: list[Outcome]) -> bytes:
    """`schemas.PredictionBatch`, encoded without making it first."""
    items = [
        {"index": index, "problem": problem(outcome).model_dump(mode="json", exclude_none=True)}
        if isinstance(outcome, MedLoopError)
        else {"index": index, "prediction": outcome.document}
        for index, outcome in enumerate(outcomes)
    ]
    return to_json({"items": items})


def create_app(settings: Settings) -> App:
    """The inference service; its parts are in `app.state.service` and run while its lifespan does."""
    # Patients' images must not touch a disk that nobody named: what a form may hold, it may hold in memory.
    MultiPartParser.spool_max_size = settings.server.max_body_bytes
    readiness = Readiness()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service: Service = app.state.service
        service.start()
        try:
            yield
        finally:
            await to_thread.run_sync(service.stop)

    async def predict_directly(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        response = await _predict(request, app.state.service)
        await response(scope, receive, send)

    app = create_base(
        "inference",
        settings.server,
        routers=[router, stream.router, oip.router, invocations.router],
        readiness=readiness,
        lifespan=lifespan,
        auth=settings.auth,
        streamed={stream.STREAMED},
        dialects={**oip.DIALECT, **invocations.DIALECT},
        direct={("POST", "/v1/predict"): Direct(predict_directly, "predict")},
    )
    app.state.service = Service(settings, readiness, app.state.metrics)
    return app
