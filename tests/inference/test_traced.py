"""With traces on, the span of a request says where its slowest image's time went, whatever protocol was spoken."""

import base64
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
from medloop.bundle import Bundle
from medloop.http import App
from medloop.http.traced import Traced
from medloop.testing import asgi_client
from medloop.tracing.spans import Tracing
from medloop_inference.app import create_app
from medloop_inference.predict import Predictor
from medloop_inference.service import Service
from medloop_inference.settings import Settings
from medloop_inference.traced import TracedPredictor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

pytestmark = pytest.mark.anyio

PNG = {"content-type": "image/png"}
STAGES = ("decode", "queue", "network", "total")


@pytest.fixture
def memory() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def app(settings: Settings, memory: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> Iterator[App]:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")  # nobody is asked there: see below
    app = create_app(settings)
    tracing = Tracing("inference", memory, "memory")
    tracing.start()
    app.entry = Traced(app.guard, tracing, app.guard.direct)
    app.state.tracing = tracing
    yield app
    tracing.stop(5)


@pytest.fixture
async def client(app: App, evaluator: Any, first: Bundle) -> AsyncIterator[httpx.AsyncClient]:
    evaluator.champion(first)
    async with asgi_client(app) as http:
        app.state.service.watcher.poll_once()
        yield http


async def test_every_protocol_s_span_has_the_stage_times_of_the_answer(
    app: App, client: httpx.AsyncClient, memory: InMemorySpanExporter, grey: Callable[..., bytes]
) -> None:
    images = [grey(10), grey(200), b"no image"]
    one = (await client.post("/v1/predict", content=images[0], headers=PNG)).json()
    files = [("files", (f"doe-{i}", image, "image/png")) for i, image in enumerate(images)]
    many = (await client.post("/v1/predict", files=files)).json()
    encoded = [base64.b64encode(image).decode() for image in images]
    lines = "".join(json.dumps({"id": "doe", "image": image}) + "\n" for image in encoded)
    stream = await client.post("/v1/predict/stream", content=lines, headers={"content-type": "application/x-ndjson"})
    streamed = [line["prediction"] for line in map(json.loads, stream.text.splitlines()) if "prediction" in line]
    await client.post("/invocations", content=images[0], headers=PNG)
    app.state.tracing.stop(5)

    spans = [dict(span.attributes or {}) for span in memory.get_finished_spans()]
    routes = ["/v1/predict", "/v1/predict", "/v1/predict/stream", "/invocations"]
    assert [span["http.route"] for span in spans] == routes
    answers = [[one], [item["prediction"] for item in many["items"] if item.get("prediction")], streamed]
    for span, answered in zip(spans, answers, strict=False):
        slowest = max(answered, key=lambda answer: float(answer["milliseconds"]["total"]))
        assert {stage: span[f"medloop.{stage}_ms"] for stage in STAGES} == slowest["milliseconds"]
    for span in spans:
        assert (span["medloop.model.version"], span["medloop.model.engine"]) == ("1", "onnxruntime")
    assert all("doe" not in str(span) and str(one["label"]) not in str(span) for span in spans)


def test_while_off_the_plain_predictor_answers(settings: Settings) -> None:
    app = create_app(settings)
    service: Service = app.state.service
    assert type(service.predictor) is Predictor
    assert app.entry is app.guard


def test_while_on_the_traced_one_does(app: App) -> None:
    assert type(app.state.service.predictor) is TracedPredictor
