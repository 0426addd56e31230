"""A span for each request, by OpenTelemetry's conventions for HTTP servers.

What could say something about a patient stays out: addresses with their queries, file names, bodies, and the messages
of exceptions. The route's template stands for the path.
"""

import logging
import os
import threading
from collections.abc import Mapping

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from medloop import __version__
from medloop.tracing.export import Delivery

logger = logging.getLogger(__name__)

_W3C = TraceContextTextMapPropagator()
_METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})


class RequestSpan:
    """One request from its headers to its last byte; `notes` become attributes when it ends."""

    def __init__(self, span: Span, method: str) -> None:
        self._span, self._method = span, method
        self.notes: dict[str, AttributeValue] = {}
        self.trace_id = format_trace_id(span.get_span_context().trace_id)

    @property
    def headers(self) -> dict[str, str]:
        """What a call made for this request sends along (W3C Trace Context)."""
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, set_span_in_context(self._span))
        return carrier

    def end(self, route: str | None, status: int, error: type[BaseException] | None = None) -> None:
        """The answer is out. `route` is the template, unless no route fits; `status` is 0 where none was sent."""
        span = self._span
        if span.is_recording():
            span.set_attributes(self.notes)
            if route is not None:
                span.update_name(f"{self._method} {route}")
                span.set_attribute("http.route", route)
            if status:
                span.set_attribute("http.response.status_code", status)
            if error is not None or not 0 < status < 500:
                span.set_attribute(
                    "error.type", error.__qualname__ if error is not None else str(status or "no answer")
                )
                span.set_status(StatusCode.ERROR)
        span.end()


class Tracing:
    """Makes the spans of one service and hands them to `exporter`, which sends them `to` some address.

    Between `start` and `stop` a thread does that, every five seconds unless the standard's variables say otherwise.
    Neither the process's global provider nor its global context is touched: those are for whoever embeds us.
    """

    def __init__(self, service: str, exporter: SpanExporter, to: str) -> None:
        self._service, self._exporter, self._to = service, exporter, to
        self._provider: TracerProvider | None = None
        self._delivery: Delivery | None = None
        self._tracer: Tracer | None = None

    def start(self) -> None:
        self._delivery = Delivery(self._exporter, self._to)
        self._provider = TracerProvider(resource=_resource(self._service), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(self._delivery))
        self._tracer = self._provider.get_tracer("medloop", __version__)

    def begin(self, method: str, scheme: str, headers: Mapping[bytes, bytes]) -> RequestSpan | None:
        """The span of a request that comes now; None before `start` and after `stop`."""
        if self._tracer is None:
            return None
        sent = {name: headers[name.encode()].decode("latin-1") for name in _W3C.fields if name.encode() in headers}
        known = method in _METHODS
        span = self._tracer.start_span(
            method if known else "HTTP",
            context=_W3C.extract(sent),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method if known else "_OTHER", "url.scheme": scheme},
        )
        return RequestSpan(span, method if known else "HTTP")

    def stop(self, seconds: float) -> None:
        """Send what is left, within `seconds`; what could not be sent then is dropped. Asked twice, it does nothing."""
        provider, self._provider = self._provider, None
        if provider is None or self._delivery is None:
            return
        self._tracer = None
        # The processor would wait for half a minute, so it waits in a thread that the process's end does not wait for.
        sending = threading.Thread(target=_end, args=(provider, self._delivery), name="last traces", daemon=True)
        sending.start()
        if not self._delivery.failing:
            sending.join(seconds)
            if sending.is_alive():
                logger.warning("the last traces were not delivered within %.1f s and are dropped", seconds)
        self._delivery.shutdown()


def _end(provider: TracerProvider, delivery: Delivery) -> None:
    provider.shutdown()
    delivery.forget()


def _resource(service: str) -> Resource:
    own = {"service.version": __version__}
    if "OTEL_SERVICE_NAME" not in os.environ and "service.name=" not in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        own["service.name"] = f"medloop-{service}"
    return Resource.create(own)
