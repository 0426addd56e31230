"""Traces: what a span says and does not say, that nothing exists while they are off, that nothing waits for them."""

import http.server
import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, Request, Response
from medloop.clients import EvaluatorClient
from medloop.errors import InvalidRequest, StorageFull
from medloop.http import App, Direct, Readiness, create_app, require
from medloop.http.traced import Traced
from medloop.log import JsonFormatter
from medloop.settings import ServerSettings
from medloop.testing import asgi_client, free_port
from medloop.tracing import current, open_tracing, outgoing
from medloop.tracing.spans import Tracing
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

pytestmark = pytest.mark.anyio

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("OTEL_") or name == "TRACEPARENT":
            monkeypatch.delenv(name)


class Collector(http.server.ThreadingHTTPServer):
    """A collector on loopback that keeps the spans it is sent, by OTLP over HTTP."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.requests: list[ExportTraceServiceRequest] = []
        self.refuse: int | None = None
        self.hang = threading.Event()
        self.hang.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def spans(self) -> list[Span]:
        return [span for r in self.requests for of in r.resource_spans for s in of.scope_spans for span in s.spans]

    @property
    def service(self) -> str:
        names: set[str] = {
            attribute.value.string_value
            for request in self.requests
            for of in request.resource_spans
            for attribute in of.resource.attributes
            if attribute.key == "service.name"
        }
        return ", ".join(names)


class _Receiver(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        assert (self.path, self.headers["content-type"]) == ("/v1/traces", "application/x-protobuf")
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.hang.wait(30)
        if self.server.refuse is None:
            self.server.requests.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(self.server.refuse or 200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.hang.set()
        server.shutdown()
        thread.join()


def make_app() -> App:
    router = APIRouter(prefix="/v1", dependencies=[require("predict")])

    @router.post("/images/{name}")
    async def image(name: str, request: Request) -> dict[str, str]:
        await request.body()
        return outgoing()

    @router.get("/full")
    async def full() -> None:
        raise StorageFull("The disk is full: free some space.")

    @router.get("/broken")
    async def broken() -> None:
        raise ZeroDivisionError("patient Jane Doe")

    async def direct(scope: Any, receive: Any, send: Any) -> None:
        span = current.get()
        assert span is None or span.notes.update({"medloop.network_ms": 1.5}) is None
        await Response("direct")(scope, receive, send)

    return create_app(
        "test",
        ServerSettings(),
        routers=[router],
        readiness=Readiness(),
        direct={("GET", "/v1/direct"): Direct(direct, "predict")},
    )


@pytest.fixture
def memory() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@asynccontextmanager
async def traced(memory: InMemorySpanExporter, app: App | None = None) -> Any:
    """A client of an application whose spans are in `memory` when it is closed."""
    app = app or make_app()
    tracing = Tracing("test", memory, "memory")
    app.entry = Traced(app.guard, tracing, app.guard.direct)
    tracing.start()
    try:
        async with asgi_client(app) as client:
            yield client
    finally:
        tracing.stop(5)


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


async def test_a_span_says_what_was_asked_and_answered_and_nothing_of_what_was_in_it(
    memory: InMemorySpanExporter,
) -> None:
    async with traced(memory) as client:
        answer = await client.post(
            "/v1/images/doe-jane.dcm?patient=jane", content=b"Jane Doe", headers={"x-request-id": "r-1"}
        )
        assert answer.status_code == 200
    (span,) = memory.get_finished_spans()
    assert (span.name, span.kind, span.parent) == ("POST /v1/images/{name}", SpanKind.SERVER, None)
    assert attributes(span) == {
        "http.request.method": "POST",
        "url.scheme": "http",
        "http.route": "/v1/images/{name}",
        "http.response.status_code": 200,
        "medloop.request_id": "r-1",
    }
    assert span.status.status_code is StatusCode.UNSET
    assert "jane" not in span.to_json().lower()


async def test_errors_are_marked_by_whose_they_are_and_their_messages_stay_here(memory: InMemorySpanExporter) -> None:
    async with traced(memory) as client:
        await client.get("/v1/full")
        await client.get("/v1/broken")
        await client.get("/patients/jane")
        await client.get("/v1/full", headers={"host": "evil.example"})  # refused before any route is looked for
        await client.request("JANE", "/v1/full")
    told = [
        (s.name, attributes(s)["http.response.status_code"], attributes(s).get("error.type"), s.status.status_code)
        for s in memory.get_finished_spans()
    ]
    assert told == [
        ("GET /v1/full", 507, "507", StatusCode.ERROR),
        ("GET /v1/broken", 500, "500", StatusCode.ERROR),
        ("GET", 404, None, StatusCode.UNSET),
        ("GET", 403, None, StatusCode.UNSET),
        ("HTTP /v1/full", 405, None, StatusCode.UNSET),
    ]
    assert "jane" not in "".join(span.to_json() for span in memory.get_finished_spans()).lower()


async def test_a_direct_answer_has_its_route_and_its_notes(memory: InMemorySpanExporter) -> None:
    async with traced(memory) as client:
        assert (await client.get("/v1/direct")).text == "direct"
    (span,) = memory.get_finished_spans()
    assert span.name == "GET /v1/direct"
    assert attributes(span)["medloop.network_ms"] == 1.5


async def test_probes_are_not_traced(memory: InMemorySpanExporter) -> None:
    async with traced(memory) as client:
        for path in ("/livez", "/readyz", "/metrics", "/ping"):
            await client.get(path)
    assert memory.get_finished_spans() == ()


async def test_a_trace_goes_on_from_caller_to_callee(memory: InMemorySpanExporter) -> None:
    async with traced(memory) as client:
        sent = (await client.post("/v1/images/a", headers={"traceparent": TRACEPARENT, "tracestate": "k=v"})).json()
        await client.post("/v1/images/a", headers={"traceparent": "00-nonsense"})
    joined, own = memory.get_finished_spans()
    assert joined.context is not None
    assert joined.parent is not None
    assert (f"{joined.context.trace_id:032x}", f"{joined.parent.span_id:016x}") == (TRACE, PARENT)
    assert sent == {"traceparent": f"00-{TRACE}-{joined.context.span_id:016x}-01", "tracestate": "k=v"}
    assert own.parent is None


async def test_log_lines_of_a_traced_request_name_its_trace(
    memory: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter("test"))
    logging.getLogger("medloop.http").addHandler(handler)
    try:
        async with traced(memory) as client:
            await client.get("/v1/broken", headers={"traceparent": TRACEPARENT})
    finally:
        logging.getLogger("medloop.http").removeHandler(handler)
    (line,) = map(json.loads, stream.getvalue().splitlines())
    assert line["trace_id"] == TRACE
    assert line["request_id"]


async def test_a_caller_decides_whether_its_requests_are_sampled(memory: InMemorySpanExporter) -> None:
    async with traced(memory) as client:
        sent = (await client.post("/v1/images/a", headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})).json()
    assert memory.get_finished_spans() == ()
    assert sent["traceparent"].startswith(f"00-{TRACE}-")
    assert sent["traceparent"].endswith("-00")


def test_a_client_joins_the_trace_of_the_job_that_it_runs_in(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("traceparent"))
        return httpx.Response(200, json=[])

    with EvaluatorClient("http://x", transport=httpx.MockTransport(answer)) as client:
        for value in (TRACEPARENT, "nonsense", ""):
            monkeypatch.setenv("TRACEPARENT", value)
            client.timeline("m")
    assert seen == [TRACEPARENT, None, None]


# As the environment asks for it, to a real collector.


async def test_spans_reach_a_collector_under_the_service_s_name(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENDPOINT, collector.url)
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")  # FastAPI's own must not double ours
    async with asgi_client(make_app()) as client:
        await client.get("/v1/full", headers={"traceparent": TRACEPARENT})
        assert collector.spans == []  # nothing waits for it
    (span,) = collector.spans
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == ("GET /v1/full", TRACE, PARENT)
    assert (span.kind, span.status.code) == (Span.SPAN_KIND_SERVER, Status.STATUS_CODE_ERROR)
    assert 0 < span.end_time_unix_nano - span.start_time_unix_nano < 60e9
    assert collector.service == "medloop-test"


@pytest.mark.parametrize(
    ("variables", "service", "spans"),
    [
        ({"OTEL_SERVICE_NAME": "triage"}, "triage", 1),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=ward-7,site=north"}, "ward-7", 1),
        ({"OTEL_TRACES_SAMPLER": "always_off"}, None, 0),
        ({"OTEL_SDK_DISABLED": "true"}, None, 0),
        ({"OTEL_TRACES_EXPORTER": "none"}, None, 0),
    ],
)
async def test_the_standard_s_variables_hold(
    variables: dict[str, str], service: str | None, spans: int, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {ENDPOINT: collector.url, **variables}.items():
        monkeypatch.setenv(name, value)
    async with asgi_client(make_app()) as client:
        await client.get("/v1/full")
    assert len(collector.spans) == spans
    assert service is None or collector.service == service


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({ENDPOINT: "collector:4318"}, f"{ENDPOINT} must be an address"),
        ({ENDPOINT: "http://c", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL can only be"),
    ],
)
def test_what_cannot_be_done_is_said_at_the_start(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidRequest, match=message):
        make_app()


def test_without_the_extra_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:4318")
    with pytest.raises(InvalidRequest, match=r'not installed: pip install "medloop\[tracing\]", or unset it'):
        open_tracing("test")


WITHOUT = """
import asyncio, sys
import medloop.tracing, medloop.log
early = [name for name in sys.modules if name.startswith("opentelemetry")]
assert not early, early
from medloop.auth import AuthSettings
from medloop.clients import InferenceClient
from medloop.http import Readiness, create_app
from medloop.settings import ServerSettings
from medloop.testing import asgi_client
app = create_app("test", ServerSettings(), routers=[], readiness=Readiness())
async def ask():
    async with asgi_client(app) as client:
        assert (await client.get("/livez")).status_code == 200
asyncio.run(ask())
assert app.entry is app.guard
# FastAPI imports OpenTelemetry's API whether anybody wants it or not.
heavy = ("opentelemetry.sdk", "opentelemetry.exporter", "opentelemetry.proto", "medloop.tracing.")
late = [name for name in sys.modules if name.startswith(heavy)]
assert not late, late
"""


def test_while_off_nothing_of_it_is_imported_and_nothing_stands_before_the_guard() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT], check=True, timeout=60)


# When the collector is away.


@contextmanager
def told() -> Iterator[list[logging.LogRecord]]:
    """Everything that anybody logs from WARNING up."""
    records: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    handler = Keep(logging.WARNING)
    logging.getLogger().addHandler(handler)
    try:
        yield records
    finally:
        logging.getLogger().removeHandler(handler)


def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError


async def test_a_collector_that_is_away_is_told_once_and_delays_neither_answers_nor_the_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(ENDPOINT, f"http://user:secret@127.0.0.1:{free_port()}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "4")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1")
    with told() as records:
        async with asgi_client(make_app()) as client:
            await client.get("/v1/images/a")
            until(lambda: bool(records))  # and the exporter goes on trying, for ten seconds
            for _ in range(20):
                await client.get("/v1/images/a")
            stopping = time.monotonic()
        assert time.monotonic() - stopping < 5  # far below the thirty seconds that OpenTelemetry's own would take
    (record,) = records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("traces do not arrive at http://127.0.0.1:")


async def test_two_applications_of_one_process_tell_each_of_its_own_collector(
    monkeypatch: pytest.MonkeyPatch, memory: InMemorySpanExporter
) -> None:
    closed = free_port()
    monkeypatch.setenv(ENDPOINT, f"http://127.0.0.1:{closed}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
    with told() as records:
        async with traced(memory) as well, asgi_client(make_app()) as ill:
            await well.get("/v1/images/a")
            await ill.get("/v1/images/a")
            until(lambda: bool(records))
    (record,) = records
    assert record.getMessage().startswith(f"traces do not arrive at http://127.0.0.1:{closed} and")


async def test_a_collector_that_hangs_is_left_behind_at_the_stop(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENDPOINT, collector.url)
    collector.hang.clear()
    with told() as records:
        app = make_app()
        async with asgi_client(app) as client:
            await client.get("/v1/images/a")
            app.readiness.stop_by = time.monotonic() + 0.2
    (record,) = records
    assert re.fullmatch(r"the last traces were not delivered within 0\.[012] s and are dropped", record.getMessage())


async def test_a_collector_that_refuses_and_then_takes_traces_is_told_twice(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(ENDPOINT, collector.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
    collector.refuse = 401
    caplog.set_level(logging.INFO, "medloop.tracing")
    async with asgi_client(make_app()) as client:
        for _ in range(3):
            await client.get("/v1/images/a")
            until(lambda: bool(caplog.records))
        collector.refuse = None
        await client.get("/v1/full")
        until(lambda: len(caplog.records) > 1)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("medloop.tracing")]
    assert len(messages) == 2
    assert "401" in messages[0]
    assert messages[1].startswith("traces arrive at")
