"""`POST /v1/predict/stream`: any number of images in one request, answered while they still arrive.

In: NDJSON, `{"id": …, "image": base64}` a line, or multipart/form-data, which spares the third that base64 adds. Out:
NDJSON, a line for each image as soon as it is answered or refused, then one summary. A bounded number of images is in
work at once; when the service is busy, or all requests together hold enough, the stream waits and reads no further, so
the network's own flow control slows the sender down. A client that reads nothing until it has sent everything may have
1,000 images in one request.

When the service stops, a stream reads no further: what it has read is answered, and the summary says how far it got.
"""

import math
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, Final, TypeAlias

import anyio
from anyio.abc import TaskGroup
from anyio.streams.memory import MemoryObjectSendStream
from fastapi import APIRouter, Request, Response
from medloop.errors import InvalidRequest, MedLoopError, RateLimited, Unavailable, UnsupportedImage
from medloop.http import App, Readiness, problem, require
from medloop.http.held import SHARE, Share
from pydantic_core import to_json
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from medloop_inference.answer import Answer, Options
from medloop_inference.foreign import BINARY, Service, options_of
from medloop_inference.predict import Predictor
from medloop_inference.stream_bodies import Entry, boundary_of, read_lines, read_parts

NDJSON: Final = "application/x-ndjson"
_LINES: Final = (NDJSON, "application/ndjson", "application/jsonl")
MULTIPART: Final = "multipart/form-data"
IN_WORK: Final = 32
"""Images of one stream that are decoded or wait for the network at once: enough to fill its batches."""
IN_WORK_BYTES: Final = 64 * 2**20
UNREAD: Final = 1024
"""Answers that wait for a client that does not read them yet."""
PATIENCE_S: Final = 60.0
"""How long an image of a stream waits for a busy service before it is refused."""

FIRST_WAIT_S: Final = 0.05
LOOK_S: Final = 0.2
"""Between two looks at whether the service stops."""
LAST_PATIENCE_S: Final = 2.0
"""How long an image waits for a busy service that stops."""
LAST_S: Final = 8.0
"""What a stream has to end once the service stops, however slowly its client reads."""
LINGER_S: Final = 1.0
"""How long what a client still sends is thrown away once it has its summary: closing on it could lose the summary."""

Lines: TypeAlias = MemoryObjectSendStream[bytes]

STREAMED: Final = "/v1/predict/stream"
router = APIRouter(prefix="/v1", tags=["inference"], dependencies=[require("predict")])


@router.post(
    "/predict/stream",
    summary="Answer for any number of images while they arrive",
    response_class=Response,
    responses={200: {"description": "A line for each image, then a summary", "content": {NDJSON: BINARY}}},
    openapi_extra={"requestBody": {"required": True, "content": {NDJSON: BINARY, MULTIPART: BINARY}}},
)
async def predict_stream(request: Request, parts: Service) -> Response:
    app: App = request.app
    if app.readiness.draining:
        raise Unavailable("The service stops; send the stream again in a moment.")
    parts.watcher.served()
    share: Share = request.scope[SHARE]
    given = request.headers.get("content-type", "")
    content_type = given.partition(";")[0].strip().lower()
    if content_type in _LINES:
        entries = read_lines(request.stream(), share)
    elif content_type == MULTIPART:
        entries = read_parts(request.stream(), boundary_of(given), share)
    else:
        raise UnsupportedImage(f"Send {NDJSON}, or {MULTIPART} with an image in each part.")
    return _Answering(entries, parts.predictor, options_of(request), app.readiness, share)


class _Window:
    """How many images of one stream are in work: fewer while the service is busy (AIMD)."""

    def __init__(self) -> None:
        self._limit = IN_WORK
        self._images = self._bytes = 0
        self._left = anyio.Event()

    async def enter(self, size: int) -> None:
        """Wait until there is room; one image always has some."""
        while self._images and (self._images >= self._limit or self._bytes + size > IN_WORK_BYTES):
            await self._left.wait()
        self._images += 1
        self._bytes += size

    def leave(self, size: int) -> None:
        self._images -= 1
        self._bytes -= size
        self._limit = min(IN_WORK, self._limit + 1)
        self._left.set()
        self._left = anyio.Event()

    def busy(self) -> None:
        self._limit = max(1, self._limit // 2)


class _Answering(Response):
    """Reads entries and writes lines at the same time, until both are through, the client is gone, or the service
    stops."""

    def __init__(
        self,
        entries: AsyncIterator[Entry],
        predictor: Predictor,
        options: Options,
        readiness: Readiness,
        share: Share,
    ) -> None:
        super().__init__(media_type=NDJSON)
        del self.headers["content-length"]
        self._entries, self._predictor, self._options = entries, predictor, options
        self._window, self._share = _Window(), share
        self._answered = self._refused = 0
        self._problem: MedLoopError | None = None  # what broke the body off
        self._readiness = readiness
        self._reading = anyio.CancelScope()  # of the next entry
        self._stopping = self._cut_off = False  # the service stops; and did before everything was read
        self._give_up = math.inf
        self._sent = anyio.Event()  # the rest of what was not read any more

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        lines, ready = anyio.create_memory_object_stream[bytes](UNREAD)
        async with anyio.create_task_group() as everything:
            everything.start_soon(self._answer_all, lines, receive, everything)
            everything.start_soon(self._look_for_stop, everything.cancel_scope)
            async with ready:
                async for line in ready:
                    body = bytearray(line)
                    while ready.statistics().current_buffer_used:
                        body += ready.receive_nowait()
                    await send({"type": "http.response.body", "body": bytes(body), "more_body": True})
            await send({"type": "http.response.body", "body": self._summary(), "more_body": self._cut_off})
            if self._cut_off:
                with anyio.move_on_after(LINGER_S):
                    await self._sent.wait()
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            everything.cancel_scope.cancel()  # nobody needs to notice any more that the client leaves

    async def _answer_all(self, lines: Lines, receive: Receive, everything: TaskGroup) -> None:
        async with lines, anyio.create_task_group() as answering:
            try:
                while (entry := await self._next()) is not None:
                    size = 0 if isinstance(entry.image, MedLoopError) else len(entry.image)
                    self._share.add(size)
                    await self._window.enter(size)
                    answering.start_soon(self._answer, entry, size, lines)
            except ClientDisconnect:
                everything.cancel_scope.cancel()
            except InvalidRequest as exc:
                self._problem = exc
            everything.start_soon(self._until_gone, receive, everything.cancel_scope)

    async def _next(self) -> Entry | None:
        """The next entry; None at the end, or when the service stops."""
        with anyio.CancelScope() as self._reading:
            if not self._stopping:
                await self._room()
                return await anext(self._entries, None)
        self._cut_off = True
        return None

    async def _room(self) -> None:
        """Between two entries, wait for others to let go of theirs: one that has begun could only be refused."""
        with anyio.move_on_after(PATIENCE_S):
            while self._share.crowded:
                await anyio.sleep(LOOK_S)

    async def _look_for_stop(self, everything: anyio.CancelScope) -> None:
        while not self._readiness.draining:  # set by a signal, which wakes nobody
            await anyio.sleep(LOOK_S)
        self._stopping, self._give_up = True, anyio.current_time() + LAST_PATIENCE_S
        self._reading.cancel()
        everything.deadline = anyio.current_time() + LAST_S

    async def _until_gone(self, receive: Receive, everything: anyio.CancelScope) -> None:
        """Throw away what still comes, and end everything when the client is gone."""
        while (message := await receive())["type"] != "http.disconnect":
            if not message.get("more_body", False):
                self._sent.set()
        everything.cancel()

    async def _answer(self, entry: Entry, size: int, lines: Lines) -> None:
        try:
            outcome = await self._outcome(entry)
            if isinstance(outcome, MedLoopError):
                self._refused += 1
                result = b'"problem":' + problem(outcome).model_dump_json(exclude_none=True).encode()
            else:
                self._answered += 1
                result = b'"prediction":' + outcome.json
            await lines.send(b'{"index":%d,"id":%s,%s}\n' % (entry.index, to_json(entry.id), result))
        finally:
            self._window.leave(size)
            self._share.remove(size)

    async def _outcome(self, entry: Entry) -> Answer | MedLoopError:
        if isinstance(entry.image, MedLoopError):
            return entry.image
        options = replace(self._options, frame=entry.frame or self._options.frame)
        wait, give_up = FIRST_WAIT_S, anyio.current_time() + PATIENCE_S
        while True:
            try:
                return await self._predictor.predict(entry.image, options)
            except RateLimited as exc:
                if anyio.current_time() + wait > min(give_up, self._give_up):
                    return exc
                self._window.busy()
                await anyio.sleep(wait)
                wait = min(2 * wait, float(exc.retry_after))
            except MedLoopError as exc:
                return exc

    def _summary(self) -> bytes:
        summary: dict[str, Any] = {
            "images": self._answered + self._refused,
            "answered": self._answered,
            "refused": self._refused,
        }
        broken = self._problem
        if broken is None and self._cut_off:
            broken = Unavailable(
                f"The service stops and reads no further; {self._answered} images were answered. "
                "Send those that have no line again in a moment."
            )
        if broken is not None:
            summary["problem"] = problem(broken).model_dump(mode="json", exclude_none=True)
        return to_json({"summary": summary}) + b"\n"
