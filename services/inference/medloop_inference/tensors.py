"""Requests and answers of the Open Inference Protocol (v2, REST) with its binary tensor extension.

A body is a JSON object, and behind it, where the header `Inference-Header-Content-Length` says how long that object is,
the values of those tensors that have a `binary_data_size`, in their order: numbers little-endian in row-major order,
BYTES elements each after its length (uint32). Everything that a client could get wrong is told it as InvalidRequest.
"""

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

import numpy as np
from medloop.bundle import Pixels
from medloop.errors import BodyTooLarge, InvalidRequest
from medloop.vision.prepare import PreparationSpec
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json, to_json

from medloop_inference.answer import Answer
from medloop_inference.foreign import (
    LARGEST_FRAME,
    MAX_IMAGES,
    MAX_JSON,
    check_count,
    check_json,
    from_base64,
    pixels_of,
    shape_of,
)

INPUT: Final = "image"
MAX_INFLATED: Final = 64 * 2**20
"""Bytes that a compressed body may unpack to, its binary tensor included."""
_LENGTH = struct.Struct("<I")
_MAX_INT = 2**53  # what every JSON parser can hold exactly (RFC 8259 §6)

Count = Annotated[int, Field(ge=0, le=_MAX_INT)]


class _Part(BaseModel):
    # What decides how a tensor is read or returned must be understood; elsewhere the protocol lets servers ignore it.
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class InputParameters(_Part):
    """`binary_data_size` bytes behind the JSON hold the values; `content_type` says how text stands for bytes."""

    binary_data_size: Count | None = None
    content_type: str | None = Field(default=None, pattern="^base64$")


class InputTensor(_Part):
    """`image`: BYTES [N] of image files (in JSON: base64), or UINT8 [N, S, S, C] of prepared pixels."""

    name: str
    shape: list[Annotated[int, Field(ge=-_MAX_INT, le=_MAX_INT)]] = Field(max_length=16, fail_fast=True)
    datatype: str
    parameters: InputParameters = InputParameters()
    data: list[Any] | None = None


class OutputParameters(_Part):
    binary_data: bool | None = None


class RequestedOutput(_Part):
    name: str
    parameters: OutputParameters = OutputParameters()


class InferParameters(BaseModel):
    """`timeout` in microseconds, after which nobody waits (0: no limit); `frame` of multi-frame DICOM, from 1."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    binary_data_output: bool = False
    timeout: Count | None = None
    frame: Annotated[int, Field(ge=1, le=LARGEST_FRAME)] | None = None


class InferRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    id: str | None = Field(default=None, max_length=1024)
    parameters: InferParameters = InferParameters()
    inputs: list[InputTensor] = Field(min_length=1, max_length=1, fail_fast=True)
    outputs: Annotated[list[RequestedOutput], Field(max_length=64, fail_fast=True)] | None = None


class OutputTensor(BaseModel):
    """One output of N images; `data` is flat, and absent where `parameters.binary_data_size` bytes follow instead."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, int] | None = None
    data: list[Any] | None = None


class InferResponse(BaseModel):
    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request understood: image files, or pixels uint8 [N, S, S, C], which `request` does not hold any more."""

    request: InferRequest
    images: list[bytes] | Pixels


def inflate(body: bytes, encoding: str | None, limit: int = MAX_INFLATED) -> bytes:
    """The body without its `Content-Encoding` (gzip or deflate), at most `limit` bytes; raises InvalidRequest."""
    if encoding is None or encoding.lower() == "identity":
        return body
    if encoding.lower() not in ("gzip", "deflate"):
        raise InvalidRequest(f"Content-Encoding {encoding[:50]!r} is not read: send gzip, deflate or none.")
    unpacking = zlib.decompressobj(wbits=32 + zlib.MAX_WBITS)  # zlib's or gzip's header, whichever is there
    try:
        plain = unpacking.decompress(body, limit + 1)
    except zlib.error as exc:
        raise InvalidRequest("The body is not compressed as its Content-Encoding says.") from exc
    if len(plain) > limit:
        raise BodyTooLarge(
            f"The body unpacks to more than the {limit / 2**20:.0f} MiB that are allowed, which are "
            f"{MAX_JSON / 2**20:.0f} MiB for JSON and {MAX_INFLATED / 2**20:.0f} MiB with a binary tensor behind it."
        )
    if not unpacking.eof or unpacking.unused_data:
        raise InvalidRequest("The compressed body is cut off, or more follows behind it.")
    return plain


def read_request(body: bytes, header_length: str | None, spec: PreparationSpec) -> Asked:
    """Understand a body whose JSON object is `header_length` bytes long (None: all of it)."""
    length = _header_length(header_length, len(body))
    document = body[:length]
    check_json(document)
    try:
        # In two steps, which take a third of the memory that one does.
        request = InferRequest.model_validate(from_json(document, allow_inf_nan=False))
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "the JSON object"
        raise InvalidRequest(f"The request is not as the protocol has it: {where}: {first['msg']}.") from exc
    except ValueError as exc:
        raise InvalidRequest(f"The request is no JSON object: {exc}.") from exc
    _check_outputs(request.outputs or [])
    (tensor,) = request.inputs
    if tensor.name != INPUT:
        raise InvalidRequest(f"The model has no input {tensor.name[:50]!r}; its only one is {INPUT!r}.")
    behind = memoryview(body)[length:]
    size = tensor.parameters.binary_data_size
    if (size or 0) != len(behind):
        raise InvalidRequest(f"{len(behind)} bytes follow the JSON object, but binary_data_size promises {size or 0}.")
    if (size is None) == (tensor.data is None):
        raise InvalidRequest("An input needs either data or a binary_data_size, and not both.")
    return Asked(request.model_copy(update={"inputs": []}), _read_tensor(tensor, behind, spec))


def _check_outputs(outputs: Sequence[RequestedOutput]) -> None:
    for output in outputs:
        if output.name not in OUTPUTS:
            raise InvalidRequest(f"The model has no output {output.name[:50]!r}; it has {', '.join(OUTPUTS)}.")
    if len({output.name for output in outputs}) < len(outputs):
        raise InvalidRequest("An output is requested twice.")


def _header_length(given: str | None, total: int) -> int:
    if given is None:
        return total
    if not (given.isascii() and given.isdigit() and len(given) <= 16 and int(given) <= total):
        raise InvalidRequest(f"Inference-Header-Content-Length must be a number of bytes, at most the body's {total}.")
    return int(given)


def _read_tensor(tensor: InputTensor, behind: memoryview, spec: PreparationSpec) -> list[bytes] | Pixels:
    pixels = tuple(shape_of(spec))
    if not 1 <= (tensor.shape or [0])[0] <= MAX_IMAGES:
        raise InvalidRequest(f"The first dimension of shape is the number of images: 1 to {MAX_IMAGES} in a request.")
    if tensor.datatype == "BYTES" and len(tensor.shape) == 1:
        return check_count(_image_files(tensor, behind))
    if tensor.datatype == "UINT8" and tuple(tensor.shape[1:]) == pixels:
        return _prepared(tensor, behind, spec)
    raise InvalidRequest(
        f"{tensor.datatype[:20]} {tensor.shape} is not an input of this model: send {INPUT!r} as BYTES [N], "
        f"the image files, or as UINT8 {['N', *pixels]}, prepared pixels."
    )


def _image_files(tensor: InputTensor, behind: memoryview) -> list[bytes]:
    if tensor.data is None:
        return read_elements(behind, tensor.shape[0])
    if len(tensor.data) != tensor.shape[0]:
        raise InvalidRequest(f"data has {len(tensor.data)} elements where shape promises {tensor.shape[0]}.")
    if not all(isinstance(text, str) for text in tensor.data):
        raise InvalidRequest("Elements of a BYTES tensor in JSON must be text: the image files in base64.")
    return [from_base64(text, f"Element {index} of data") for index, text in enumerate(tensor.data)]


def _prepared(tensor: InputTensor, behind: memoryview, spec: PreparationSpec) -> Pixels:
    shape = tuple(tensor.shape)
    if tensor.data is not None:
        return pixels_of(tensor.data, spec, shape)
    expected = int(np.prod(shape))
    if len(behind) != expected:
        raise InvalidRequest(f"UINT8 {tensor.shape} takes {expected} bytes, but binary_data_size is {len(behind)}.")
    return np.frombuffer(behind, np.uint8).reshape(shape)


def read_elements(data: memoryview, count: int) -> list[bytes]:
    """The `count` elements of a BYTES tensor; raises InvalidRequest unless they fill `data` exactly."""
    elements: list[bytes] = []
    at = 0
    while at < len(data) and len(elements) <= count:
        end = at + _LENGTH.size
        if end > len(data):
            raise InvalidRequest("The BYTES tensor is cut off within the length of an element.")
        end += _LENGTH.unpack_from(data, at)[0]
        if end > len(data):
            raise InvalidRequest(f"Element {len(elements)} of the BYTES tensor is longer than what was sent.")
        elements.append(bytes(data[at + _LENGTH.size : end]))
        at = end
    if len(elements) != count:
        raise InvalidRequest(f"The BYTES tensor does not hold the {count} elements that its shape promises.")
    return elements


def write_elements(values: Sequence[str]) -> bytes:
    """Text as the values of a BYTES tensor (UTF-8)."""
    encoded = [value.encode() for value in values]
    return b"".join(part for value in encoded for part in (_LENGTH.pack(len(value)), value))


TEXT: Final[dict[str, Callable[[dict[str, Any]], str]]] = {
    "label": lambda document: str(document["label"]),
    "prediction_set": lambda document: to_json(document["prediction_set"]).decode(),
    "decision": lambda document: str(document["decision"]),
    "reasons": lambda document: to_json(document["reasons"]).decode(),
    "prediction_id": lambda document: str(document["id"]),
}
"""Outputs BYTES [N], from a prediction's document; lists are JSON."""
FIGURES: Final = {"outlier_score": "score", "outlier_percentile": "percentile"}
"""Outputs FP32 [N] and their names in `schemas.Outlier`; there where the bundle knows enough of its training images."""
OUTPUTS: Final = {"probabilities": "FP32", **dict.fromkeys(TEXT, "BYTES"), **dict.fromkeys(FIGURES, "FP32")}
"""Every output and its datatype."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A response's body and, where values follow its JSON object, that object's length in bytes."""

    body: bytes
    json_length: int | None


def write_response(request: InferRequest, answers: Sequence[Answer]) -> Encoded:
    """The requested outputs of N ≥ 1 answers by one model, or all that there are.

    Raises InvalidRequest for an outlier score where the model has none.
    """
    missing = FIGURES.keys() if answers[0].document["outlier"] is None else set[str]()
    outputs: list[dict[str, Any]] = []
    behind: list[bytes] = []
    for output in request.outputs or [RequestedOutput(name=name) for name in OUTPUTS if name not in missing]:
        if output.name in missing:
            raise InvalidRequest(f"The served version knows too little of its training images for {output.name}.")
        binary = output.parameters.binary_data
        tensor, raw = _column(output.name, answers, request.parameters.binary_data_output if binary is None else binary)
        outputs.append(tensor)
        behind += [raw] if raw is not None else []
    model = answers[0].document["model"]
    echoed = {"id": request.id} if request.id is not None else {}
    head = to_json({"model_name": model["name"], "model_version": model["version"], **echoed, "outputs": outputs})
    return Encoded(b"".join([head, *behind]), len(head) if behind else None)


def _column(name: str, answers: Sequence[Answer], binary: bool) -> tuple[dict[str, Any], bytes | None]:
    """One output of all answers: its JSON, and its bytes where it is to follow in binary."""
    if name in TEXT:
        texts = [TEXT[name](answer.document) for answer in answers]
        return _tensor(name, [len(texts)], texts, write_elements(texts) if binary else None)
    if name == "probabilities":
        values: NDArray[np.float32] = np.stack([answer.probabilities for answer in answers])  # f32 [N, K]
    else:
        values = np.array([answer.document["outlier"][FIGURES[name]] for answer in answers], np.float32)
    return _tensor(
        name, list(values.shape), values.ravel().tolist(), values.astype("<f4").tobytes() if binary else None
    )


def _tensor(name: str, shape: list[int], data: list[Any], raw: bytes | None) -> tuple[dict[str, Any], bytes | None]:
    values = {"data": data} if raw is None else {"parameters": {"binary_data_size": len(raw)}}
    return {"name": name, "datatype": OUTPUTS[name], "shape": shape, **values}, raw
