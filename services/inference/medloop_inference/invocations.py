"""`/invocations` and `/ping`, as MLflow's scoring server and SageMaker's container contract have them.

An image as the body gives one prediction. JSON as MLflow writes it (exactly one of `inputs`, `instances`,
`dataframe_split` and `dataframe_records`) gives `{"predictions": [...]}`: images are files in base64, as MLflow has
binary columns in JSON, or prepared pixels as the bundle's signature says. A batch is answered as a whole: an image that
cannot be read fails its request, which says which one it was.
"""

from collections.abc import Sequence
from typing import Any, Final

from fastapi import APIRouter, HTTPException, Request, Response
from medloop.bundle import Pixels
from medloop.errors import InvalidRequest, UnsupportedImage
from medloop.http import Dialects, require
from medloop.schemas import Prediction, Problem
from medloop.vision.prepare import PreparationSpec
from pydantic import BaseModel, ConfigDict
from pydantic_core import from_json

from medloop_inference.foreign import (
    BINARY,
    JSON_LIMIT,
    Service,
    all_answered,
    check_count,
    check_json,
    check_ready,
    check_version,
    from_base64,
    inline_schema,
    options_of,
    parsed,
    pixels_of,
    read_body,
)

_JSON: Final = "application/json"
_IMAGE_TYPES: Final = ("image/*", "application/x-image", "application/dicom", "application/octet-stream")
COLUMN: Final = "image"


class SplitFrame(BaseModel):
    columns: list[str]
    data: list[list[Any]]


class Invocation(BaseModel):
    """Exactly one of the four, as MLflow's scoring protocol has them."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"minProperties": 1, "maxProperties": 1})

    inputs: list[Any] | dict[str, Any] | None = None
    instances: list[Any] | None = None
    dataframe_split: SplitFrame | None = None
    dataframe_records: list[dict[str, Any]] | None = None


class Predictions(BaseModel):
    predictions: list[Prediction]


def _members(problem: Problem) -> dict[str, Any]:
    # As MLflow's own server names it.
    return {"error_code": "BAD_REQUEST" if problem.status < 500 else "INTERNAL_ERROR", "message": problem.detail}


DIALECT: Final[Dialects] = {"invocations": _members, "ping": _members}


# `/ping` is open to everybody, as the shared access rules have it.
router = APIRouter(tags=["mlflow and sagemaker"], dependencies=[require("predict")])


@router.get("/ping", summary="A model answers")
async def ping(request: Request) -> dict[str, str]:
    check_ready(request)
    return {"status": "ready"}


@router.post(
    "/invocations",
    summary="Answer for one image (the body) or for several (JSON)",
    response_model=Prediction | Predictions,
    openapi_extra={
        "requestBody": {
            "required": True,
            "description": JSON_LIMIT,
            "content": {_JSON: {"schema": inline_schema(Invocation)}, **dict.fromkeys(_IMAGE_TYPES, BINARY)},
        }
    },
)
async def invocations(request: Request, parts: Service) -> Response:
    _check_accept(request.headers.get("accept", "*/*"))
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    options = options_of(request)
    parts.watcher.served()
    parts.check_door()  # before the body is read: refusing must cost little
    body = await read_body(request)
    if content_type == _JSON:
        served = parts.watcher.served()
        images = await parsed(lambda: read_images(body, served.bundle.card.preparation), len(body))
        if isinstance(images, list):
            answers = all_answered(await parts.predictor.predict_many(images, options))
        else:
            answers = all_answered(await parts.predictor.predict_pixels(images, options))
            check_version(answers, served)
        joined = b",".join(answer.json for answer in answers)
        return Response(b'{"predictions":[' + joined + b"]}", media_type=_JSON)
    if not content_type.startswith("image/") and content_type not in _IMAGE_TYPES:
        raise UnsupportedImage(f"Send an image as one of {', '.join(_IMAGE_TYPES)}, or {_JSON} as MLflow writes it.")
    return Response((await parts.predictor.predict(body, options)).json, media_type=_JSON)


def _check_accept(accept: str) -> None:
    ranges = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    if not {"", "*/*", "application/*", _JSON}.intersection(ranges):
        raise HTTPException(406, f"Answers are {_JSON}; ask for that in Accept.")


def read_images(body: bytes, spec: PreparationSpec) -> list[bytes] | Pixels:
    """The images of an MLflow document: files, or prepared pixels uint8 [N, S, S, C]; raises InvalidRequest."""
    check_json(body)
    try:
        document = from_json(body, allow_inf_nan=False)
    except ValueError as exc:
        raise InvalidRequest(f"The body is no JSON: {exc}.") from exc
    names = Invocation.model_fields.keys()
    if not isinstance(document, dict) or len(document) != 1 or not document.keys() <= names:
        raise InvalidRequest(f"The body must be a JSON object with exactly one of {', '.join(names)}.")
    ((name, value),) = document.items()
    values = _READ[name](value)
    if not isinstance(values, list) or not values:
        raise InvalidRequest(f"{name} must hold at least one image.")
    texts = [_text(item) for item in check_count(values)]
    if all(text is not None for text in texts):
        return [from_base64(text, f"Image {index}") for index, text in enumerate(texts) if text is not None]
    return pixels_of(values, spec)


def _text(item: Any) -> str | None:
    """Base64 as MLflow has it, or wrapped as TensorFlow Serving does."""
    if isinstance(item, dict) and item.keys() == {"b64"}:
        item = item["b64"]
    return item if isinstance(item, str) else None


def _inputs(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {COLUMN}:
        value = value[COLUMN]
    return [value] if isinstance(value, str) else value


def _records(value: Any) -> Any:
    if not isinstance(value, list):
        return None
    return [item[COLUMN] if isinstance(item, dict) and item.keys() == {COLUMN} else item for item in value]


def _split(value: Any) -> Any:
    if not isinstance(value, dict) or not isinstance(value.get("data"), list) or value.get("columns") != [COLUMN]:
        raise InvalidRequest(f"dataframe_split must have data, and columns [{COLUMN!r}].")
    rows: Sequence[Any] = value["data"]
    if not all(isinstance(row, list) and len(row) == 1 for row in rows):
        raise InvalidRequest("Each row of dataframe_split must hold one value, the image.")
    return [row[0] for row in rows]


_READ: Final = {"inputs": _inputs, "instances": _records, "dataframe_split": _split, "dataframe_records": _records}
