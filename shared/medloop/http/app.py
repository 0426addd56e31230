"""The app factory that every API is made with.

It gives: `/livez`, `/readyz`, `/metrics`, OpenAPI, problem details (RFC 9457) for every error, `X-Request-ID` in
answers and logs, limits on what comes in, and the access rules of `medloop.auth`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from http import HTTPStatus

from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import JSONResponse
from fastapi.telemetry import TelemetryConfig
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp, Receive, Scope, Send

from medloop import __version__
from medloop.auth import Access, AuthSettings
from medloop.http.guard import Direct, Guard
from medloop.http.problems import PROBLEM, Dialects, add_handlers
from medloop.http.scopes import require, route_scopes
from medloop.http.traced import Traced
from medloop.schemas import Problem
from medloop.settings import ServerSettings
from medloop.tracing import open_tracing

STOP_SECONDS = 20.0
"""How long stopping may take once no more connections are taken, requests and all parts of a service together:
whoever stops it (Kubernetes, `medloop down`) kills it after 30 s, of which a load balancer needs some to notice."""
TRACES_SECONDS = 2.0
"""How long the last traces may take to leave when a service stops, of the time that is left then."""
_NO_TELEMETRY = TelemetryConfig(tracing=False, metrics=False, logs=False, operation_spans=False, auto_configure=False)
"""FastAPI's own would send queries and messages of exceptions, which may be about patients; and it sees less than the
guard, around which ours stands."""
_SCHEMA = {"schema": Problem.model_json_schema()}

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


class Readiness:
    """The outcome of a service's last self-check; `/readyz` only reads it. It is false, too, as long as `access` can
    let nobody in; once the service drains, it stays false."""

    def __init__(self) -> None:
        self._reason: str | None = "starting"
        self.access: Access | None = None
        self.draining = False
        self.stop_by: float | None = None

    @property
    def reason(self) -> str | None:
        if self.draining:
            return "draining"
        return self._reason or (self.access.unready_reason if self.access is not None else None)

    @property
    def ready(self) -> bool:
        return self.reason is None

    def passed(self) -> None:
        self._reason = None

    def failed(self, reason: str) -> None:
        self._reason = reason

    def drain(self, seconds: float = 0.0) -> None:
        """The process is about to stop, after `seconds`: what was accepted is finished, and callers are told to go
        elsewhere. From here on `stop_by` (on the clock of `time.monotonic`) is when everything should have ended."""
        self.draining = True
        stop_by = time.monotonic() + seconds + STOP_SECONDS
        self.stop_by = stop_by if self.stop_by is None else min(stop_by, self.stop_by)


class App(FastAPI):
    """A FastAPI application with the guard around it, so that it also guards what FastAPI never sees. `entry` is the
    guard, or what traces it."""

    entry: ASGIApp
    guard: Guard
    readiness: Readiness
    access: Access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self.entry(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def create_app(
    title: str,
    settings: ServerSettings,
    *,
    routers: list[APIRouter],
    readiness: Readiness,
    lifespan: Lifespan | None = None,
    auth: AuthSettings | None = None,
    direct: Mapping[tuple[str, str], Direct] | None = None,
    streamed: Collection[str] = (),
    dialects: Dialects | None = None,
) -> App:
    """An API with everything that all of MedLoop's have; `routers` add what it is for.

    `direct` has, by method and path, bare ASGI applications for what is asked thousands of times a second: they get
    all that the guard does (request id, access, limits, metrics, problem documents) and nothing of FastAPI. They stand
    before a route of the same path, which then only describes them in OpenAPI.

    Bodies of the paths in `streamed` may be of any size and take any time, as long as something arrives every
    `body_seconds`: whoever reads them must bound what is held.

    `dialects` has what problem documents under a path hold beside the members of RFC 9457.

    Traces are on where the environment asks for them (`medloop.tracing`); raises InvalidRequest when it cannot be done.

    Each route says which scope it needs (`require`); a router with one that says nothing is for `admin` alone.
    """
    access = Access(auth or AuthSettings())
    tracing = open_tracing(title)

    async def end_traces() -> None:
        if tracing is not None:
            left = TRACES_SECONDS if readiness.stop_by is None else readiness.stop_by - time.monotonic()
            await asyncio.to_thread(tracing.stop, min(TRACES_SECONDS, max(0.0, left)))

    @asynccontextmanager
    async def whole(app: FastAPI) -> AsyncIterator[None]:
        async with access.running(), AsyncExitStack() as parts:
            if tracing is not None:
                tracing.start()
                parts.push_async_callback(end_traces)  # last of all
            if lifespan is not None:
                await parts.enter_async_context(lifespan(app))
            parts.callback(access.begin_stop)  # before the service's own parts, whose end may take longer
            yield

    app = App(
        title=f"MedLoop {title}",
        version=__version__,
        lifespan=whole,
        telemetry=_NO_TELEMETRY,
        responses={"default": {"description": "Problem details (RFC 9457)", "content": {PROBLEM: _SCHEMA}}},
    )
    metrics = CollectorRegistry()
    app.state.metrics = metrics
    degraded = Gauge("medloop_access_degraded", "What access checks rest on that is out of reach", registry=metrics)
    degraded.set_function(lambda: len(access.problems))
    app.readiness = readiness
    readiness.access = access
    app.access = access
    add_handlers(app, dialects or {})
    app.include_router(_operations(readiness, metrics))
    for router in routers:
        app.include_router(router, dependencies=[] if all(route_scopes(router.routes).values()) else [require("admin")])
    app.guard = Guard(
        super(App, app).__call__, settings, access, metrics, readiness, direct or {}, streamed, dialects or {}
    )
    app.entry = app.guard if tracing is None else Traced(app.guard, tracing, direct or {})
    return app


def _operations(readiness: Readiness, metrics: CollectorRegistry) -> APIRouter:
    router = APIRouter(tags=["operation"])

    @router.get("/livez", summary="The process runs")
    async def livez() -> dict[str, str]:
        return {"status": "alive"}

    @router.get("/readyz", summary="The outcome of the last self-check")
    async def readyz() -> JSONResponse:
        reason = readiness.reason
        body = {"status": "ready"} if reason is None else {"status": "not ready", "reason": reason}
        return JSONResponse(body, HTTPStatus.OK if reason is None else HTTPStatus.SERVICE_UNAVAILABLE)

    @router.get("/metrics", summary="Prometheus metrics", response_class=Response)
    async def read_metrics() -> Response:
        return Response(generate_latest(metrics), media_type=CONTENT_TYPE_LATEST)

    return router
