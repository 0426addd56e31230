"""While a store hangs, whoever corrects is told in time, and nothing that was given is lost."""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import anyio
import httpx
import pytest
from fastapi import FastAPI
from medloop.bundle import Bundle
from medloop.schemas import Prediction, new_id
from medloop.settings import StorageSettings
from medloop.storage.objects import ObjectStore
from medloop.storage.records import RecordStore
from medloop.testing import asgi_client
from medloop_inference.app import create_app
from medloop_inference.corrections import Corrections
from medloop_inference.service import CORRECTING, Service
from medloop_inference.settings import RecordingSettings, ServingSettings, Settings

from .conftest import MODEL, NEVER, Evaluator

pytestmark = pytest.mark.anyio

Grey = Callable[..., bytes]
LONG = 30.0  # seconds: what hung would be given up after more than a minute by itself


class HangingS3(ThreadingHTTPServer):
    """Takes every request, and answers while `answering` is set; `stored` are the bodies by path."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answering = threading.Event()
        self.stored: dict[str, bytes] = {}

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gave up is what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    server: HangingS3
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.answering.wait()
        if self.command == "PUT":
            self.server.stored[self.path] = body
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_PUT = _answer  # noqa: N815  the standard library's names

    def log_message(self, format: str, *args: object) -> None:
        """Keep the tests' output quiet."""


@pytest.fixture
def s3(home: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[HangingS3]:
    server = HangingS3()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "MEDLOOP_OBJECTS_URL": "s3://bucket",
        "MEDLOOP_OBJECTS_SECONDS": "0.3",
    }.items():
        monkeypatch.setenv(name, value)
    yield server
    server.answering.set()
    server.shutdown()
    server.server_close()


async def correct(client: httpx.AsyncClient, prediction_id: str, image: bytes) -> httpx.Response:
    return await client.post(
        f"/v1/predictions/{prediction_id}/correction",
        data={"label": "bright", "author": "Dr. Test"},
        files={"image": ("x.png", image, "image/png")},
    )


async def send_until_taken(client: httpx.AsyncClient, prediction_id: str, image: bytes) -> httpx.Response:
    """What a person does; on a busy machine one answer of S3 may take longer than the test's time limit."""
    until = time.monotonic() + LONG
    answer = await correct(client, prediction_id, image)
    while answer.status_code == 503 and time.monotonic() < until:
        answer = await correct(client, prediction_id, image)
    return answer


async def test_a_hanging_s3_is_told_in_time_and_loses_nothing(
    s3: HangingS3, tracking_uri: str, evaluator: Evaluator, first: Bundle, grey: Grey
) -> None:
    app = create_app(
        Settings(
            serving=ServingSettings(model=MODEL, poll_seconds=NEVER),
            recording=RecordingSettings(store_images=True),
            storage=StorageSettings(),
        )
    )
    evaluator.champion(first)
    service: Service = app.state.service
    service.watcher.poll_once()
    async with asgi_client(app) as client:
        answered = await client.post("/v1/predict", content=grey(9), headers={"content-type": "image/png"})
        prediction = Prediction.model_validate(answered.json())
        ids = [prediction.id, *(new_id() for _ in range(3))]  # more than are stored at once
        responses: list[httpx.Response] = []

        async def send(prediction_id: str) -> None:
            responses.append(await correct(client, prediction_id, grey(9)))

        began = time.monotonic()
        async with anyio.create_task_group() as sending:
            for prediction_id in ids:
                sending.start_soon(send, prediction_id)
        assert time.monotonic() - began < LONG
        assert [response.status_code for response in responses] == [503] * 4
        assert "storage-unavailable" in {response.json()["code"] for response in responses}
        assert all(int(response.headers["retry-after"]) > 0 for response in responses)
        assert (await client.get("/v1/corrections")).json() == []  # nothing is claimed
        assert service.recorder.waiting == 1

        s3.answering.set()
        again = [await send_until_taken(client, prediction_id, grey(9)) for prediction_id in ids]
        assert all(response.is_success for response in again)
        assert len((await client.get("/v1/corrections")).json()) == 4
        service.recorder.stop(60)
        assert (service.recorder.waiting, service.recorder.dropped) == (0, 0)
        record = service.records.get("predictions", prediction.id)
    assert record is not None
    digests = {hashlib.sha256(body).hexdigest() for body in s3.stored.values()}
    assert digests == {record.document["stored_image"], again[0].json()["image_hash"]}


class HangingRecords:
    """Records that take corrections only once `answering` is set."""

    def __init__(self, records: RecordStore) -> None:
        self._records = records
        self.answering, self.done = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._records, name)

    def put_once(self, kind: str, record_id: str, document: Mapping[str, Any]) -> bool:
        assert self.answering.wait(60)
        new = self._records.put_once(kind, record_id, document)
        self.done.set()
        return new


async def test_whatever_hangs_a_correction_is_answered_and_stays_one(
    app: FastAPI, client: httpx.AsyncClient, service: Service, objects: ObjectStore, records: RecordStore, grey: Grey
) -> None:
    hanging = HangingRecords(records)
    service.corrections = Corrections(MODEL, objects, hanging)
    service.answer_seconds = 0.3
    prediction_id = new_id()
    began = time.monotonic()
    answers = [await correct(client, prediction_id, grey(9)) for _ in range(CORRECTING + 1)]
    assert time.monotonic() - began < LONG
    assert [(answer.status_code, answer.json()["code"]) for answer in answers] == [(503, "unavailable")] * 3
    assert all(int(answer.headers["retry-after"]) > 0 for answer in answers)
    hanging.answering.set()
    assert hanging.done.wait(60)
    service.answer_seconds = LONG
    assert (await correct(client, prediction_id, grey(9))).status_code == 200  # it was stored all the same
    assert len((await client.get("/v1/corrections")).json()) == 1
