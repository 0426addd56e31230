"""The Open Inference Protocol, version 2, over REST: `/v2`, as KServe and NVIDIA's Triton define it.

With the binary tensor extension and compressed requests, so that `tritonclient[http]` works unchanged. One model is
served, in one version: any other name or version in the path is not found. The protocol has no place for the refusal of
one image of a batch, so one that cannot be read fails its request, which says which one it was.
"""

from dataclasses import replace
from time import monotonic
from typing import Annotated, Any, Final

from fastapi import APIRouter, Header, Request, Response
from medloop import __version__
from medloop.errors import NotFound
from medloop.http import Dialects, require
from medloop.schemas import Problem
from pydantic import BaseModel

from medloop_inference.answer import Options
from medloop_inference.champion import Served
from medloop_inference.foreign import (
    BINARY,
    JSON_LIMIT,
    MAX_JSON,
    Parts,
    Service,
    all_answered,
    check_ready,
    check_version,
    inline_schema,
    options_of,
    parsed,
    read_body,
)
from medloop_inference.tensors import (
    INPUT,
    MAX_INFLATED,
    OUTPUTS,
    Asked,
    InferRequest,
    InferResponse,
    inflate,
    read_request,
    write_response,
)

HEADER_LENGTH = "Inference-Header-Content-Length"


class ServerMetadata(BaseModel):
    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    """-1 in `shape` is the number of images."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class Live(BaseModel):
    live: bool


class Ready(BaseModel):
    ready: bool


class ModelReady(BaseModel):
    name: str
    ready: bool


def _members(problem: Problem) -> dict[str, Any]:
    return {"error": problem.detail}


DIALECT: Final[Dialects] = {"v2": _members}
router = APIRouter(prefix="/v2", tags=["open inference protocol"], dependencies=[require("predict")])
_INFER: dict[str, Any] = {
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "description": JSON_LIMIT,
            "content": {
                "application/json": {"schema": inline_schema(InferRequest)},
                "application/octet-stream": BINARY,
            },
        }
    },
    "responses": {200: {"model": InferResponse, "content": {"application/octet-stream": BINARY}}},
    "response_class": Response,
}


@router.get("", summary="Server metadata")
async def server() -> ServerMetadata:
    return ServerMetadata(name="medloop", version=__version__, extensions=["binary_tensor_data"])


@router.get("/health/live", summary="The process runs")
async def live() -> Live:
    return Live(live=True)


@router.get("/health/ready", summary="A model answers")
async def ready(request: Request) -> Ready:
    check_ready(request)
    return Ready(ready=True)


@router.get("/models/{name}", summary="What the model takes and gives")
@router.get("/models/{name}/versions/{version}", summary="What the served version takes and gives")
async def model(parts: Service, name: str, version: str | None = None) -> ModelMetadata:
    served = _find(parts, name, version)
    classes = len(served.bundle.card.classes)
    return ModelMetadata(
        name=served.ref.name,
        versions=[served.ref.version],
        platform=f"{served.ref.engine}_{served.ref.precision}",
        inputs=[TensorMetadata(name=INPUT, datatype="BYTES", shape=[-1])],
        outputs=[
            TensorMetadata(name=output, datatype=datatype, shape=[-1, classes] if output == "probabilities" else [-1])
            for output, datatype in OUTPUTS.items()
        ],
    )


@router.get("/models/{name}/ready", summary="This model answers")
@router.get("/models/{name}/versions/{version}/ready", summary="This version answers")
async def model_ready(parts: Service, name: str, version: str | None = None) -> ModelReady:
    return ModelReady(name=_find(parts, name, version).ref.name, ready=True)


@router.post("/models/{name}/infer", summary="Answer for up to 256 images", **_INFER)
@router.post("/models/{name}/versions/{version}/infer", summary="Answer for up to 256 images by this version", **_INFER)
async def infer(
    request: Request,
    parts: Service,
    name: str,
    version: str | None = None,
    header_length: Annotated[str | None, Header(alias=HEADER_LENGTH)] = None,
    encoding: Annotated[str | None, Header(alias="Content-Encoding")] = None,
) -> Response:
    _find(parts, name, version)
    parts.check_door()  # refusing must cost little: before the body is read, and before it is unpacked
    body = await read_body(request)
    parts.check_door()
    served = _find(parts, name, version)  # it may have changed while the body came in
    limit = MAX_JSON if header_length is None else MAX_INFLATED

    def understand() -> Asked:
        return read_request(inflate(body, encoding, limit), header_length, served.bundle.card.preparation)

    asked = await parsed(understand, len(body), packed=encoding is not None)
    options = _within(options_of(request, frame=asked.request.parameters.frame), asked.request.parameters.timeout)
    if isinstance(asked.images, list):
        outcomes = await parts.predictor.predict_many(asked.images, options)
    else:
        outcomes = await parts.predictor.predict_pixels(asked.images, options)
    answers = all_answered(outcomes)
    if version is not None or not isinstance(asked.images, list):
        check_version(answers, served)
    encoded = write_response(asked.request, answers)
    if encoded.json_length is None:
        return Response(encoded.body, media_type="application/json")
    return Response(encoded.body, 200, {HEADER_LENGTH: str(encoded.json_length)}, "application/octet-stream")


def _find(parts: Parts, name: str, version: str | None) -> Served:
    """What is served, if that is what the path names; raises NotFound and NoModel."""
    served = parts.watcher.served()
    ref = served.ref
    if name != ref.name or version not in (None, ref.version):
        wanted = name if version is None else f"{name} version {version}"
        raise NotFound(f"{wanted[:100]} is not served here; what answers is {ref.name} version {ref.version}.")
    return served


def _within(options: Options, timeout_us: int | None) -> Options:
    """With the request's own time limit where it is the earlier one; as in Triton, 0 is none."""
    if not timeout_us:
        return options
    deadline = monotonic() + timeout_us / 1e6
    return replace(options, deadline=deadline if options.deadline is None else min(deadline, options.deadline))
