"""Traces for OpenTelemetry, off unless the standard's own variables ask for them.

spans.py   a span for each request, and how all of them end up in one pipeline
export.py  how they leave: never in anybody's way, and told once when they do not arrive

`OTEL_EXPORTER_OTLP_ENDPOINT` turns them on. While they are off nothing of OpenTelemetry's SDK is imported, which is why
those modules are imported late and this one needs neither.
"""

import os
import re
from contextvars import ContextVar
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from medloop.errors import InvalidRequest
from medloop.settings import mask_url

if TYPE_CHECKING:
    from medloop.tracing.spans import RequestSpan, Tracing

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL = "http/protobuf"
_TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")

current: ContextVar["RequestSpan | None"] = ContextVar("current", default=None)
"""The span of the request that is being answered; None while traces are off."""


def wanted() -> bool:
    """Whether the environment asks for traces."""
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    return os.environ.get("OTEL_TRACES_EXPORTER", "").strip() != "none" and _first(_ENDPOINTS) is not None


def open_tracing(service: str) -> "Tracing | None":
    """What traces `service` as the environment asks for it, if it does; not started yet.

    Raises InvalidRequest for an endpoint that is no address, another protocol than OTLP over HTTP, or when what sends
    traces is not installed.
    """
    if not wanted() or (found := _first(_ENDPOINTS)) is None:
        return None
    name, endpoint = found
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidRequest(f"{name} must be an address such as http://127.0.0.1:4318.")
    if (protocol := _first(_PROTOCOLS)) is not None and protocol[1] != _PROTOCOL:
        raise InvalidRequest(f"{protocol[0]} can only be {_PROTOCOL} here, for which collectors listen on port 4318.")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        from medloop.tracing.spans import Tracing
    except ImportError as exc:
        raise InvalidRequest(
            f'{name} asks for traces, and {exc.name} is not installed: pip install "medloop[tracing]", or unset it.'
        ) from exc
    return Tracing(service, OTLPSpanExporter(), mask_url(endpoint))


def outgoing() -> dict[str, str]:
    """The headers with which a call to another service joins the present trace (W3C Trace Context): that of the request
    being answered, else the one that `TRACEPARENT` names, as tools do that trace whole jobs."""
    if (span := current.get()) is not None:
        return span.headers
    given = os.environ.get("TRACEPARENT", "")
    return {"traceparent": given} if _TRACEPARENT.fullmatch(given) else {}


def _first(names: tuple[str, ...]) -> tuple[str, str] | None:
    """The first of the variables that is set to something, and what it is set to."""
    return next(((name, value) for name in names if (value := os.environ.get(name, "").strip())), None)
