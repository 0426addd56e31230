"""How the service ends: in time, whatever is under way and whoever hangs, and with a word for those it cuts off."""

import base64
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from medloop.bundle import Bundle
from medloop.errors import Overloaded
from medloop.http import App, Readiness
from medloop.http.server import FINISH_SECONDS
from medloop.settings import StorageSettings, TrackingSettings
from medloop.testing import asgi_client, free_port
from medloop_inference.answer import Answer, Options
from medloop_inference.champion import Watcher
from medloop_inference.delivery import Entry
from medloop_inference.service import PART_SECONDS, RECORDING_SECONDS, Service
from medloop_inference.settings import ServingSettings, Settings
from medloop_inference.stream import PATIENCE_S
from prometheus_client import CollectorRegistry

from .conftest import MODEL, NEVER, Evaluator
from .speaking import speaking
from .test_process import start, wait_ready

Grey = Callable[..., bytes]


@contextmanager
def streaming(port: int) -> Iterator[socket.socket]:
    """A stream that has begun."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as stream:
        stream.sendall(
            b"POST /v1/predict/stream HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/x-ndjson\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        yield stream


def chunk(image: bytes) -> bytes:
    line = json.dumps({"image": base64.b64encode(image).decode()}).encode() + b"\n"
    return b"%x\r\n%s\r\n" % (len(line), line)


def rest(stream: socket.socket) -> bytes:
    """All that still comes, until the server hangs up, however it does."""
    heard = b""
    with suppress(ConnectionError):
        while more := stream.recv(65536):
            heard += more
    return heard


def summary_of(answer: bytes) -> dict[str, object]:
    found: dict[str, object] = json.loads(next(part for part in answer.splitlines() if b"summary" in part))["summary"]
    return found


def test_an_open_stream_gets_its_summary_and_holds_nobody_up(
    watcher: Watcher, evaluator: Evaluator, first: Bundle, grey: Grey
) -> None:
    evaluator.champion(first)
    watcher.poll_once()
    port, nowhere = free_port(), f"http://127.0.0.1:{free_port()}"
    process = start(
        ["-m", "medloop_inference"], MEDLOOP_MODEL=MODEL, MEDLOOP_PORT=str(port), MLFLOW_TRACKING_URI=nowhere
    )
    try:
        wait_ready(f"http://127.0.0.1:{port}", process)
        with streaming(port) as quiet, streaming(port) as talking:
            quiet.sendall(chunk(grey(0)) * 3)
            heard = b""
            while heard.count(b'"label"') < 3:
                heard += quiet.recv(65536)
            sending = threading.Thread(target=_send_for_ever, args=(talking, chunk(grey(255, 400))))
            sending.start()
            said = talking.recv(65536)
            asked = time.monotonic()
            process.send_signal(signal.SIGTERM)
            heard += rest(quiet)
            said += rest(talking)
            sending.join()
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - asked < FINISH_SECONDS  # which it would be held up for
    finally:
        process.kill()
    assert process.returncode == -signal.SIGTERM
    assert "Traceback" not in errors
    summary = summary_of(heard)
    assert (summary["images"], summary["answered"]) == (3, 3)
    assert "The service stops" in str(summary["problem"])
    assert "3 images were answered" in str(summary["problem"])
    assert summary_of(said)["answered"] == said.count(b'"prediction"')


def _send_for_ever(stream: socket.socket, part: bytes) -> None:
    with suppress(OSError):
        while True:
            stream.sendall(part)


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that takes connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield listener.getsockname()[1]


def test_the_parts_share_what_is_left_of_the_time(settings: Settings, silent: int) -> None:
    readiness = Readiness()
    service = Service(
        Settings(
            serving=ServingSettings(model=MODEL, poll_seconds=NEVER, shadow_share=1.0),
            tracking=TrackingSettings(MLFLOW_TRACKING_URI=f"http://127.0.0.1:{silent}"),
            storage=StorageSettings(MEDLOOP_RECORDS_URL=f"mongodb://127.0.0.1:{silent}/medloop"),
        ),
        readiness,
        CollectorRegistry(),
    )
    service.start()
    service.recorder.record([Entry(b'{"id": "1"}')])
    time.sleep(0.5)  # by now everybody waits for a neighbour
    readiness.drain()
    readiness.stop_by = time.monotonic() + 1.0
    began = time.monotonic()
    service.stop()
    assert time.monotonic() - began < RECORDING_SECONDS + 2.5 * PART_SECONDS  # three hang, and one after the other
    assert service.recorder.dropped == 0
    assert service.recorder.waiting == 1  # on disk, for the next start


@pytest.mark.anyio
async def test_a_stream_of_a_busy_service_that_stops_does_not_wait_for_it(first: Bundle, grey: Grey) -> None:
    app = speaking(first)
    predictor = Busy(app)
    app.state.service.predictor = predictor
    line = json.dumps({"image": base64.b64encode(grey(0)).decode()}).encode() + b"\n"
    asking: dict[str, Any] = {"url": "/v1/predict/stream", "headers": {"content-type": "application/x-ndjson"}}
    async with asgi_client(app) as client:
        answer = await client.post(**asking, content=line)
        late = await client.post(**asking, content=line)
    told, last = map(json.loads, answer.text.splitlines())
    assert told["problem"]["code"] == "overloaded"
    assert (last["summary"]["answered"], last["summary"]["refused"]) == (0, 1)
    assert (late.status_code, late.json()["code"]) == (503, "unavailable")
    assert predictor.waited() < PATIENCE_S / 2


class Busy:
    """Refuses everything, and has the service stop when it is asked first."""

    def __init__(self, app: App) -> None:
        self._app, self._began, self._ended = app, 0.0, 0.0

    async def predict(self, image: bytes, options: Options) -> Answer:
        self._ended = time.monotonic()
        if not self._app.readiness.draining:
            self._app.readiness.drain()
            self._began = self._ended
        raise Overloaded("Busy.")

    def waited(self) -> float:
        return self._ended - self._began
