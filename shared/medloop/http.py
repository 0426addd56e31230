"""The app factory that every API is made with.

It gives: `/livez`, `/readyz`, `/metrics`, OpenAPI, problem details (RFC 9457) for every error, `X-Request-ID` in
answers and logs, a limit on bodies, and the access rules of `medloop.auth`.
"""

import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from http import HTTPStatus

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medloop import __version__
from medloop.auth import AuthSettings, check_exposure, check_request
from medloop.errors import BodyTooLarge, InvalidRequest, MedLoopError, RateLimited, Unauthenticated
from medloop.log import configure_logging, request_id
from medloop.schemas import Problem, new_id
from medloop.settings import ServerSettings

logger = logging.getLogger(__name__)

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]

_PROBLEM = "application/problem+json"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_UNEXPECTED = MedLoopError("An unexpected error occurred; the service's log says more under this request id.")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_UNGUARDED = frozenset({"/livez", "/readyz"})


class Readiness:
    """The outcome of a service's last self-check; `/readyz` only reads it."""

    def __init__(self) -> None:
        self.reason: str | None = "starting"

    @property
    def ready(self) -> bool:
        return self.reason is None

    def passed(self) -> None:
        self.reason = None

    def failed(self, reason: str) -> None:
        self.reason = reason


def create_app(
    title: str,
    settings: ServerSettings,
    *,
    routers: list[APIRouter],
    readiness: Readiness,
    lifespan: Lifespan | None = None,
    auth: AuthSettings | None = None,
) -> FastAPI:
    """An API with everything that all of MedLoop's have; `routers` add what it is for."""
    app = FastAPI(
        title=f"MedLoop {title}",
        version=__version__,
        lifespan=lifespan,
        responses={"default": {"model": Problem, "description": "Problem details (RFC 9457)"}},
    )
    metrics = CollectorRegistry()
    app.state.metrics = metrics
    app.add_exception_handler(MedLoopError, _handle_ours)
    app.add_exception_handler(RequestValidationError, _handle_validation)
    app.add_exception_handler(HTTPException, _handle_http)
    app.include_router(_operations(readiness, metrics))
    for router in routers:
        app.include_router(router)
    app.add_middleware(_Guard, settings=settings, auth=auth or AuthSettings(), metrics=metrics)
    return app


def serve(app: FastAPI, service: str, settings: ServerSettings, port: int) -> None:
    """Run `app` until SIGINT or SIGTERM; accepted requests finish first."""
    configure_logging(service, settings.log_level)
    check_exposure(AuthSettings(), settings.host)
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port or port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=20,
    )


def problem(error: MedLoopError, instance: str | None = None) -> Problem:
    """The problem document of an error."""
    return Problem(
        type=f"urn:medloop:problem:{error.code}",
        title=HTTPStatus(error.status).phrase,
        status=error.status,
        detail=error.detail,
        code=error.code,
        instance=instance,
        request_id=request_id.get(),
        **error.extra,
    )


def _operations(readiness: Readiness, metrics: CollectorRegistry) -> APIRouter:
    router = APIRouter(tags=["operation"])

    @router.get("/livez", summary="The process runs")
    async def livez() -> dict[str, str]:
        return {"status": "alive"}

    @router.get("/readyz", summary="The outcome of the last self-check")
    async def readyz() -> JSONResponse:
        body = {"status": "ready"} if readiness.ready else {"status": "not ready", "reason": readiness.reason}
        return JSONResponse(body, HTTPStatus.OK if readiness.ready else HTTPStatus.SERVICE_UNAVAILABLE)

    @router.get("/metrics", summary="Prometheus metrics", response_class=Response)
    async def read_metrics() -> Response:
        return Response(generate_latest(metrics), media_type=CONTENT_TYPE_LATEST)

    return router


def _respond(document: Problem, headers: Mapping[str, str] | None = None) -> JSONResponse:
    content = document.model_dump(mode="json", exclude_none=True)
    return JSONResponse(content, document.status, media_type=_PROBLEM, headers=headers)


async def _handle_ours(request: Request, error: Exception) -> Response:
    assert isinstance(error, MedLoopError)  # noqa: S101 - what Starlette's table of handlers promises
    if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        logger.warning("request failed: %s", error.detail, extra={"code": error.code})
    return _respond(problem(error, request.url.path), _headers(error))


def _headers(error: MedLoopError) -> dict[str, str]:
    """What HTTP wants said in a header as well."""
    if isinstance(error, RateLimited):
        return {"retry-after": str(error.retry_after)}
    return {"www-authenticate": "Bearer"} if isinstance(error, Unauthenticated) else {}


async def _handle_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - as above
    found = [{"where": ".".join(map(str, e["loc"])), "what": e["msg"]} for e in error.errors()]
    first = f"{found[0]['where']}: {found[0]['what']}" if found else "the request does not fit the schema"
    document = problem(InvalidRequest(f"The request is not valid: {first}.", errors=found), request.url.path)
    return _respond(document.model_copy(update={"status": 422, "title": HTTPStatus(422).phrase}))


async def _handle_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - as above
    title = HTTPStatus(error.status_code).phrase
    code = title.lower().replace(" ", "-")
    return _respond(
        Problem(
            type=f"urn:medloop:problem:{code}",
            title=title,
            status=error.status_code,
            detail=str(error.detail),
            code=code,
            instance=request.url.path,
            request_id=request_id.get(),
        ),
        error.headers,
    )


class _Guard:
    """ASGI middleware: request id, access rules, body limit and metrics."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, auth: AuthSettings, metrics: CollectorRegistry) -> None:
        self.app = app
        self.settings = settings
        self.auth = auth
        labels = ["method", "route", "status"]
        self.count = Counter("medloop_requests", "Requests answered", labels, registry=metrics)
        self.seconds = Histogram(
            "medloop_request_seconds", "From the first byte in to the last byte out", ["route"], registry=metrics
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        current = given if _REQUEST_ID.fullmatch(given) else new_id()
        token = request_id.set(current)
        exchange = _Exchange(receive, send, current, self.settings.max_body_bytes)
        started = time.perf_counter()
        try:
            refusal = self._refuse(scope, headers)
            if refusal is not None:
                await _respond(problem(refusal, scope["path"]), _headers(refusal))(scope, receive, exchange.send)
            else:
                await self.app(scope, exchange.receive, exchange.send)
        except Exception:  # the outermost edge: whatever gets here is a defect
            if exchange.started:
                raise
            if not exchange.over_limit:  # else reading was cut off on purpose, and the answer is 413
                # The traceback goes to the log; the caller learns only where to look.
                logger.exception("unexpected error")
            await _respond(problem(_UNEXPECTED, scope["path"]))(scope, receive, exchange.send)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            # A client may invent methods, and every label is kept for ever.
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self.count.labels(method, route, str(exchange.status)).inc()
            self.seconds.labels(route).observe(time.perf_counter() - started)
            request_id.reset(token)

    def _refuse(self, scope: Scope, headers: Headers) -> MedLoopError | None:
        try:
            if scope["path"] not in _UNGUARDED:
                check_request(self.auth, headers)
            length = headers.get("content-length", "0")
            if length.isascii() and length.isdigit() and int(length) > self.settings.max_body_bytes:
                raise _too_large(self.settings.max_body_bytes)
        except MedLoopError as refusal:
            return refusal
        return None


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request is larger than the {limit / 2**20:.0f} MiB that are allowed.", limit=limit)


class _Exchange:
    """One request and its answer: counts the bytes that come in, and marks what goes out with the request id.

    A body without a stated length may turn out too large while it is read; whatever the application makes of that,
    the answer becomes 413.
    """

    def __init__(self, receive: Receive, send: Send, current: str, limit: int) -> None:
        self._receive, self._send = receive, send
        self._current, self._limit = current, limit
        self._received = 0
        self._replaced = False
        self.started = False
        self.status = 0

    @property
    def over_limit(self) -> bool:
        return self._received > self._limit

    async def receive(self) -> Message:
        message = await self._receive()
        self._received += len(message.get("body", b""))
        if self.over_limit:
            return {"type": "http.disconnect"}
        return message

    async def send(self, message: Message) -> None:
        if self._replaced:
            return
        if message["type"] == "http.response.start":
            self.started = True
            if self.over_limit:
                await self._send_too_large()
                return
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self._current
        await self._send(message)

    async def _send_too_large(self) -> None:
        self._replaced = True
        self.status = BodyTooLarge.status
        document = problem(_too_large(self._limit)).model_dump(mode="json", exclude_none=True)
        headers = [(b"content-type", _PROBLEM.encode()), (b"x-request-id", self._current.encode())]
        await self._send({"type": "http.response.start", "status": self.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": json.dumps(document).encode()})
