"""Problem details (RFC 9457) for every error, whoever raised it."""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Send

from medloop.errors import InvalidRequest, MedLoopError, RateLimited, Unauthenticated, Unavailable
from medloop.log import request_id
from medloop.schemas import Problem
from medloop.settings import said

logger = logging.getLogger(__name__)

PROBLEM = "application/problem+json"
TOLD_SECONDS = 60.0
RETRY_SECONDS = 5
"""When to ask again where a neighbour is out of reach: it has to come back first."""

Dialects = Mapping[str, Callable[[Problem], Mapping[str, Any]]]
"""By the first segment of a path, such as `v2`: what problem documents there hold as well, since a protocol's own
clients look for what is wrong in members of their own."""


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


def _written(document: Problem, dialects: Dialects) -> bytes:
    members = document.model_dump(mode="json", exclude_none=True)
    segment = (document.instance or "").removeprefix("/").partition("/")[0]
    if (spoken := dialects.get(segment)) is not None:
        members |= spoken(document)
    return json.dumps(members).encode()


async def send_problem(error: MedLoopError, instance: str, send: Send, dialects: Dialects) -> None:
    """Answer with `error`, in bare ASGI."""
    body = _written(problem(error, instance), dialects)
    headers = {"content-type": PROBLEM, "content-length": str(len(body)), **headers_of(error)}
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def headers_of(error: MedLoopError) -> dict[str, str]:
    """What HTTP wants said in a header as well."""
    if isinstance(error, RateLimited):
        return {"retry-after": str(error.retry_after)}
    if isinstance(error, Unavailable) and error.status == HTTPStatus.SERVICE_UNAVAILABLE:
        return {"retry-after": str(RETRY_SECONDS)}
    return {"www-authenticate": "Bearer"} if isinstance(error, Unauthenticated) else {}


class Teller:
    """Puts errors that are the service's own into its log: of each code one line in `seconds`, however many requests
    met it, with the number of those that were passed over since the line before."""

    def __init__(self, seconds: float = TOLD_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock = seconds, clock
        self._again_at: dict[str, float] = {}
        self._passed_over: Counter[str] = Counter()

    def __call__(self, error: MedLoopError) -> None:
        if error.status < HTTPStatus.INTERNAL_SERVER_ERROR:
            return
        if self._clock() < self._again_at.get(error.code, 0.0):
            self._passed_over[error.code] += 1
            return
        self._again_at[error.code] = self._clock() + self._seconds
        more = self._passed_over.pop(error.code, 0)
        logger.warning("request failed: %s", error.detail, extra={"code": error.code, "passed_over": more})


tell = Teller()


def add_handlers(app: FastAPI, dialects: Dialects) -> None:
    handlers = _Handlers(dialects)
    app.add_exception_handler(MedLoopError, handlers.ours)
    app.add_exception_handler(RequestValidationError, handlers.validation)
    app.add_exception_handler(HTTPException, handlers.http)
    app.add_exception_handler(Exception, _pass_on)


class _Handlers:
    """What answers for routes."""

    def __init__(self, dialects: Dialects) -> None:
        self._dialects = dialects

    async def ours(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, MedLoopError)  # noqa: S101 - what Starlette's table of handlers promises
        tell(error)
        return self._respond(problem(error, request.url.path), headers_of(error))

    async def validation(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)  # noqa: S101 - as above
        found = [{"where": ".".join(map(str, e["loc"])), "what": said(e)} for e in error.errors()]
        first = f"{found[0]['where']}: {found[0]['what']}" if found else "the request does not fit the schema"
        document = problem(InvalidRequest(f"The request is not valid: {first}.", errors=found), request.url.path)
        return self._respond(document.model_copy(update={"status": 422, "title": HTTPStatus(422).phrase}))

    async def http(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101 - as above
        title = HTTPStatus(error.status_code).phrase
        code = title.lower().replace(" ", "-")
        document = Problem(
            type=f"urn:medloop:problem:{code}",
            title=title,
            status=error.status_code,
            detail=str(error.detail),
            code=code,
            instance=request.url.path,
            request_id=request_id.get(),
        )
        return self._respond(document, error.headers)

    def _respond(self, document: Problem, headers: Mapping[str, str] | None = None) -> Response:
        return Response(_written(document, self._dialects), document.status, media_type=PROBLEM, headers=headers)


async def _pass_on(_: Request, error: Exception) -> Response:
    """Leave what is unexpected to the guard, which stands outside and answers for bare applications too."""
    raise error
