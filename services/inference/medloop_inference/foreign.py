"""What the protocols of others have in common: bodies read safely, and images however they are written."""

import binascii
import gc
import math
import time
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Annotated, Any, Final, Protocol, TypeVar

import anyio.to_thread
import numpy as np
from anyio import CapacityLimiter
from anyio.lowlevel import RunVar
from fastapi import Depends, Request
from medloop.bundle import Pixels
from medloop.errors import BodyTooLarge, InvalidRequest, MedLoopError, Unavailable
from medloop.http import App
from medloop.vision.prepare import PreparationSpec
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from medloop_inference.answer import Answer, Options
from medloop_inference.champion import Served, Watcher
from medloop_inference.predict import Predictor

MAX_IMAGES = 256
"""Images of one request: more of them are what `POST /v1/predict/stream` is for."""
MAX_JSON: Final = 8 * 2**20
"""Bytes of JSON in one request, which cost many times their size once they are read."""
MAX_LISTS: Final = 2**19
"""Lists in it: prepared pixels of ten images [224, 224, 3], each pixel a list of its own."""
LARGEST_FRAME: Final = 2**31 - 1
JSON_LIMIT: Final = (
    f"JSON may be {MAX_JSON // 2**20} MiB long: send more as binary tensors to `/v2`, an image file as the raw body, "
    "or many of them as a form to `/v1/predict/stream`."
)
BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
LONGEST_TIMEOUT_MS = 600_000
_SLOW_BYTES = 2**17  # a longer body takes a millisecond or more to parse, and everybody else waits for the event loop

_MAX_MARKS = 2**14  # quotation marks and braces: those of 256 images need a few thousand
_parsing: RunVar[CapacityLimiter] = RunVar("medloop_inference_parsing")

T = TypeVar("T")


class Parts(Protocol):
    """What the protocols need of `app.Service`."""

    predictor: Predictor
    watcher: Watcher

    def check_door(self) -> None: ...


def _parts(request: Request) -> Parts:
    parts: Parts = request.app.state.service
    return parts


Service = Annotated[Parts, Depends(_parts)]


def check_ready(request: Request) -> None:
    """Raise Unavailable when the last self-check failed, or the service drains: as `/readyz`."""
    app: App = request.app
    if (reason := app.readiness.reason) is not None:
        raise Unavailable(f"Not ready: {reason}.")


async def read_body(request: Request) -> bytes:
    try:
        return await request.body()
    except ClientDisconnect as exc:
        raise InvalidRequest("The connection ended before the whole body had arrived; send it again.") from exc


async def parsed(parse: Callable[[], T], size: int, *, packed: bool = False) -> T:
    """What `parse` makes of `size` bytes; in a thread when that takes long, as it may for any that are `packed`.

    One at a time: what is read takes a multiple of its size meanwhile, and keeps the interpreter from everybody else.
    """
    if size <= _SLOW_BYTES and not packed:
        return parse()
    try:
        limiter = _parsing.get()
    except LookupError:  # the first in this event loop
        _parsing.set(limiter := CapacityLimiter(1))
    return await anyio.to_thread.run_sync(_without_collector, parse, limiter=limiter)


def _without_collector(parse: Callable[[], T]) -> T:
    """`parse()`, while the cyclic garbage collector rests: it would look through a document's lists again and again
    as they become more, ten times as long as parsing takes, and with the interpreter all to itself."""
    gc.disable()
    try:
        return parse()
    finally:
        gc.enable()


def check_json(text: bytes) -> None:
    """Raise BodyTooLarge for JSON that is too long, or would become far more objects than any request needs."""
    if len(text) > MAX_JSON:
        raise BodyTooLarge(JSON_LIMIT, limit=MAX_JSON)
    if text.count(b"[") > MAX_LISTS or text.count(b"{") + text.count(b'"') > _MAX_MARKS:
        raise BodyTooLarge(
            f"The JSON holds too many values; send prepared pixels in a flat list, or less. {JSON_LIMIT}"
        )


def from_base64(text: str, where: str) -> bytes:
    """The bytes that `text` stands for (RFC 4648 §4); raises InvalidRequest naming `where` it stood."""
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except (binascii.Error, ValueError) as exc:
        raise InvalidRequest(f"{where} is not base64: send the image file's bytes in the standard alphabet.") from exc


def pixels_of(numbers: list[Any], spec: PreparationSpec, shape: tuple[int, ...] | None = None) -> Pixels:
    """Prepared pixels uint8 [N, S, S, C] from numbers in nested lists, or, given their `shape`, in a flat one too.

    Raises InvalidRequest for anything but whole numbers 0–255 that fill such an array. NumPy sees nothing else: of one
    long text among many numbers it would make an array of texts, all as long.
    """
    wanted = shape or (len(check_count(numbers)), *shape_of(spec))
    flat = shape is not None and bool(numbers) and not isinstance(numbers[0], list)
    level, fits = numbers, len(numbers) == (math.prod(wanted) if flat else wanted[0])
    for inner in () if flat else wanted[1:]:
        fits = fits and all(isinstance(part, list) and len(part) == inner for part in level)
        level = list(chain.from_iterable(level)) if fits else []
    try:
        if fits and set(map(type, level)) == {int}:  # true and false are numbers to Python
            return np.frombuffer(bytes(level), np.uint8).reshape(wanted)
    except ValueError as exc:
        raise InvalidRequest("Prepared pixels must be whole numbers from 0 to 255.") from exc
    raise InvalidRequest(
        f"Prepared pixels must be whole numbers from 0 to 255, in lists nested as {['N', *shape_of(spec)]}."
    )


def shape_of(spec: PreparationSpec) -> tuple[int, int, int]:
    """[S, S, C] of one prepared image."""
    return spec.size, spec.size, spec.channels


Many = TypeVar("Many", list[bytes], list[Any], Pixels)


def check_count(images: Many) -> Many:
    if not 1 <= len(images) <= MAX_IMAGES:
        raise InvalidRequest(
            f"A request may hold 1 to {MAX_IMAGES} images, not {len(images)}: send more of them to /v1/predict/stream."
        )
    return images


def all_answered(outcomes: Sequence[Answer | MedLoopError]) -> list[Answer]:
    """The answers, for protocols without a place for the refusal of one image among others.

    Raises InvalidRequest naming the first image that is at fault, and any other error as it is.
    """
    answers = []
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, InvalidRequest):
            raise InvalidRequest(f"Image {index}, counted from 0: {outcome.detail}", index=index, reason=outcome.code)
        if isinstance(outcome, MedLoopError):
            raise outcome
        answers.append(outcome)
    return answers


def check_version(answers: Sequence[Answer], served: Served) -> None:
    """Raise Unavailable unless `served` gave all `answers`: the path named it, or the pixels were prepared for it."""
    if any(answer.document["model"]["version"] != served.ref.version for answer in answers):
        raise Unavailable("The model was changed while this was answered; ask again.")


def options_of(request: Request, *, frame: int | None = None) -> Options:
    """What the request's headers and query ask for; raises InvalidRequest."""
    given = request.headers.get("x-request-timeout-ms")
    allowed = _whole_number("X-Request-Timeout-Ms", given, LONGEST_TIMEOUT_MS)
    deadline = None if allowed is None else time.monotonic() + allowed / 1000
    frame = frame or _whole_number("frame", request.query_params.get("frame"), LARGEST_FRAME)
    return Options(frame=frame, deadline=deadline)


def _whole_number(name: str, text: str | None, largest: int) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()) or len(text) > 10 or not 1 <= int(text) <= largest:
        raise InvalidRequest(f"{name} must be a whole number from 1 to {largest}.")
    return int(text)


def inline_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a body that is not parsed by FastAPI, with nothing left to refer to."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})

    def resolved(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return resolved(parts[node["$ref"].rpartition("/")[2]]) | {k: v for k, v in node.items() if k != "$ref"}
            return {key: resolved(value) for key, value in node.items()}
        return [resolved(value) for value in node] if isinstance(node, list) else node

    found: dict[str, Any] = resolved(schema)
    return found
