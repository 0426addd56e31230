"""A span around each request, where traces are on; see `medloop.tracing`."""

from collections.abc import Collection
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medloop.auth import OPEN_PATHS
from medloop.tracing import current

if TYPE_CHECKING:
    from medloop.tracing.spans import RequestSpan, Tracing

UNTRACED = OPEN_PATHS | {"/metrics"}
"""Asked by machines every few seconds, and of interest to nobody."""


class Traced:
    """ASGI: stands outside the guard, so that what the guard refuses is traced too.

    `direct` are the methods and paths that are answered without FastAPI, which else says what route was taken.
    """

    def __init__(self, guard: ASGIApp, tracing: "Tracing", direct: Collection[tuple[str, str]]) -> None:
        self._guard, self._tracing, self._direct = guard, tracing, frozenset(direct)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        span = None
        if scope["path"] not in UNTRACED:
            span = self._tracing.begin(scope["method"], scope["scheme"], dict(scope["headers"]))
        if span is None:
            await self._guard(scope, receive, send)
        else:
            await self._trace(span, scope, receive, send)

    async def _trace(self, span: "RequestSpan", scope: Scope, receive: Receive, send: Send) -> None:
        status, error = 0, None

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                request_id = dict(message["headers"]).get(b"x-request-id", b"").decode()
                span.notes["medloop.request_id"] = request_id
            await send(message)

        token = current.set(span)
        try:
            await self._guard(scope, receive, watched)
        except BaseException as exc:
            error = type(exc)
            raise
        finally:
            current.reset(token)
            direct = (scope["method"], scope["path"]) in self._direct
            span.end(scope["path"] if direct else getattr(scope.get("route"), "path", None), status, error)
