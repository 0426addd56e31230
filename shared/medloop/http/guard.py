"""What happens to each request before and after the application.

The guard is on the path of thousands of requests a second, so it reads the headers once, as bytes, and keeps the
children of its metrics at hand.
"""

import asyncio
import logging
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medloop.auth import ANONYMOUS, OPEN_PATHS, Access, Principal, principal
from medloop.errors import BodyTooLarge, BodyTooSlow, MedLoopError
from medloop.http.held import SHARE, Held, Share
from medloop.http.problems import Dialects, send_problem, tell
from medloop.http.scopes import PRINCIPAL
from medloop.log import request_id
from medloop.schemas import new_id
from medloop.settings import ServerSettings

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_UNEXPECTED = MedLoopError("An unexpected error occurred; the service's log says more under this request id.")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_ENDING = frozenset({BodyTooLarge.status, BodyTooSlow.status})


class _Drains(Protocol):
    draining: bool


@dataclass(frozen=True, slots=True)
class Direct:
    """A bare ASGI application that answers one method and path, for callers with `scope`; it finds the `Principal`
    in its ASGI scope under `medloop.principal`."""

    app: ASGIApp
    scope: str = "admin"


class Guard:
    """ASGI: request id, access rules, limits on size and time of the body, metrics, problem documents."""

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        access: Access,
        metrics: CollectorRegistry,
        state: _Drains,
        direct: Mapping[tuple[str, str], Direct],
        streamed: Collection[str],
        dialects: Dialects,
    ) -> None:
        self.app = app
        self.settings = settings
        self.access = access
        self.state = state
        self.direct = dict(direct)
        self.streamed = frozenset(streamed)
        self.dialects = dialects
        self._count = Counter("medloop_requests", "Requests answered", ["method", "route", "status"], registry=metrics)
        self._seconds = Histogram(
            "medloop_request_seconds", "From the first byte in to the last byte out", ["route"], registry=metrics
        )
        self._held = Held(settings.max_body_bytes)
        self._counts: dict[tuple[str, str, int], Any] = {}
        self._timers: dict[str, Any] = {}

    @property
    def held_bytes(self) -> int:
        """What the bodies of requests in progress take."""
        return self._held.bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        headers: dict[bytes, bytes] = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        current = given if _REQUEST_ID.fullmatch(given) else new_id().encode()
        id_token = request_id.set(current.decode())
        who_token = principal.set(None)
        method, path = scope["method"], scope["path"]
        share = Share(self._held)
        if streamed := path in self.streamed:
            scope[SHARE] = share
        exchange = _Exchange(self, receive, send, path, current, None if streamed else share)
        direct = self.direct.get((method, path))
        try:
            who = ANONYMOUS if path in OPEN_PATHS else await self._admit(scope, headers)
            scope[PRINCIPAL] = who
            principal.set(who)
            if direct is not None:
                who.need(direct.scope)
            await (self.app if direct is None else direct.app)(scope, exchange.receive, exchange.send)
        except MedLoopError as refusal:  # raised here, or by a bare application
            tell(refusal)
            if exchange.started:
                raise
            await send_problem(refusal, path, exchange.send, self.dialects)
        except Exception:  # the outermost edge: whatever gets here is a defect
            if exchange.started:
                raise
            if exchange.refusal is None:  # else reading was cut off on purpose, and the answer says why
                # The traceback goes to the log; the caller learns only where to look.
                logger.exception("unexpected error")
            await send_problem(_UNEXPECTED, path, exchange.send, self.dialects)
        finally:
            share.end()
            route = path if direct is not None else getattr(scope.get("route"), "path", "unmatched")
            # A client may invent methods, and every label is kept for ever.
            self._measure(method if method in _METHODS else "other", route, exchange.status, started)
            principal.reset(who_token)
            request_id.reset(id_token)

    def _measure(self, method: str, route: str, status: int, started: float) -> None:
        key = (method, route, status)
        if (count := self._counts.get(key)) is None:
            count = self._counts[key] = self._count.labels(method, route, str(status))
        if (timer := self._timers.get(route)) is None:
            timer = self._timers[route] = self._seconds.labels(route)
        count.inc()
        timer.observe(time.perf_counter() - started)

    async def _admit(self, scope: Scope, headers: Mapping[bytes, bytes]) -> Principal:
        client = scope.get("client")
        who = await self.access.admit(headers, client[0] if client else "")
        length = headers.get(b"content-length", b"0") if scope["path"] not in self.streamed else b"0"
        if length.isdigit() and (len(length) > 18 or int(length) > self.settings.max_body_bytes):
            raise _too_large(self.settings.max_body_bytes)
        return who


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request is larger than the {limit / 2**20:.0f} MiB that are allowed.", limit=limit)


class _Exchange:
    """One request and its answer: watches what comes in, and marks what goes out with the request id.

    A body may turn out too large or too slow while it is read. The application then sees the client leave, and
    whatever it makes of that, the answer says what was wrong. `share` counts what the body takes; without it this one
    is streamed: it may be of any size, and only its next part must come in time.
    """

    __slots__ = (
        "_current", "_deadline", "_ended", "_guard", "_path", "_receive", "_replaced", "_send", "_share", "refusal",
        "started", "status",
    )  # fmt: skip

    def __init__(
        self, guard: Guard, receive: Receive, send: Send, path: str, current: bytes, share: Share | None
    ) -> None:
        self._guard, self._share = guard, share
        self._receive, self._send = receive, send
        self._path, self._current = path, current
        self._deadline = 0.0
        self._ended = False
        self._replaced = False
        self.refusal: MedLoopError | None = None
        self.started = False
        self.status = 0

    async def receive(self) -> Message:
        if self.refusal is not None:
            return {"type": "http.disconnect"}
        if self._ended:  # what follows a whole body is only the client's leaving, which may take its time
            return await self._receive()
        now = asyncio.get_running_loop().time()
        if self._share is None or not self._deadline:
            self._deadline = now + self._guard.settings.body_seconds
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            seconds = self._guard.settings.body_seconds
            self.refusal = BodyTooSlow(
                f"The request had not arrived after {seconds:g} s; send it faster, or less of it."
            )
            return {"type": "http.disconnect"}
        self._ended = not message.get("more_body", False)
        if self._share is not None:
            self._count(self._share, len(message.get("body", b"")))
        return message if self.refusal is None else {"type": "http.disconnect"}

    def _count(self, share: Share, size: int) -> None:
        self.refusal = share.add(size)
        if share.bytes > self._guard.settings.max_body_bytes:
            self.refusal = _too_large(self._guard.settings.max_body_bytes)

    async def send(self, message: Message) -> None:
        if self._replaced:
            return
        if message["type"] == "http.response.start":
            if self.refusal is not None and not self.started:
                self.started = True
                await send_problem(self.refusal, self._path, self._forward, self._guard.dialects)
                self._replaced = True
                return
            self.started = True
        await self._forward(message)

    async def _forward(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ()), (b"x-request-id", self._current)]
            # Who goes on sending a body that nobody reads must not keep the connection.
            if self._guard.state.draining or self.status in _ENDING:
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        await self._send(message)
