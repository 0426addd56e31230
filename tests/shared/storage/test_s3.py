"""What S3 does when it fails or says nothing, told by a small server that answers as a test says, and when."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from medloop.errors import MedLoopError, NotFound, StorageFull, StorageUnavailable
from medloop.storage.objects import ObjectStore, open_objects


class ScriptedS3(ThreadingHTTPServer):
    """Answers requests in the order of `script`: (status, error code), the last for ever; keeps what it was sent."""

    def __init__(self, script: list[tuple[int, str]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = script
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.writer = ""
        self.asked, self.answering = threading.Event(), threading.Event()
        self.answering.set()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gave up is what a test is about."""


class _Handler(BaseHTTPRequestHandler):
    server: ScriptedS3
    protocol_version = "HTTP/1.1"  # boto3 waits a second for "100 Continue", which 1.0 does not send

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.command, dict(self.headers)))
        self.server.asked.set()
        self.server.answering.wait()
        script = self.server.script
        status, code = script.pop(0) if len(script) > 1 else script[0]
        body = f"<Error><Code>{code}</Code><Message>told</Message></Error>".encode() if status >= 300 else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if self.command == "HEAD":
            self.send_header("x-amz-meta-writer", self.server.writer or self._last_writer())
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = _answer  # noqa: N815  the standard library's names

    def _last_writer(self) -> str:
        return next(headers["x-amz-meta-writer"] for _, headers in self.server.seen if "x-amz-meta-writer" in headers)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the tests' output quiet."""


Serve = Callable[..., tuple[ScriptedS3, ObjectStore]]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    servers = []

    def start(*script: tuple[int, str]) -> tuple[ScriptedS3, ObjectStore]:
        server = ScriptedS3(list(script))
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
        return server, open_objects("s3://bucket/prefix")

    yield start
    for server in servers:
        server.answering.set()
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (403, "AccessDenied", StorageUnavailable),
        (403, "InvalidAccessKeyId", StorageUnavailable),
        (404, "NoSuchBucket", StorageUnavailable),
        (404, "NoSuchKey", NotFound),
        (507, "XMinioStorageFull", StorageFull),
        (403, "QuotaExceeded", StorageFull),
        (400, "Odd", StorageUnavailable),
    ],
)
def test_failures_become_our_errors(serve: Serve, status: int, code: str, error: type[MedLoopError]) -> None:
    _, objects = serve((status, code))
    with pytest.raises(MedLoopError) as caught:
        objects.get("key")
    assert type(caught.value) is error
    assert "hunter2" not in str(caught.value)


def test_a_passing_failure_is_tried_again(serve: Serve) -> None:
    server, objects = serve((503, "SlowDown"), (200, ""))
    objects.put("key", b"x")
    assert len(server.seen) == 2


def test_a_lasting_failure_is_told_after_a_few_tries(serve: Serve) -> None:
    server, objects = serve((503, "SlowDown"))
    with pytest.raises(StorageUnavailable, match="SlowDown"):
        objects.put("key", b"x")
    assert len(server.seen) == 4


def test_a_write_whose_answer_was_lost_is_known_as_ours(serve: Serve) -> None:
    _, objects = serve((500, "InternalError"), (412, "PreconditionFailed"), (200, ""))
    assert objects.put_if_absent("key", b"x")


def test_a_write_that_another_writer_won_is_not_ours(serve: Serve) -> None:
    server, objects = serve((500, "InternalError"), (412, "PreconditionFailed"), (200, ""))
    server.writer = "another"
    assert not objects.put_if_absent("key", b"x")


def test_two_conditional_writes_at_once_are_tried_again(serve: Serve) -> None:
    server, objects = serve((409, "ConditionalRequestConflict"), (200, ""))
    assert objects.put_if_absent("key", b"x")
    assert all(headers["If-None-Match"] == "*" for _, headers in server.seen)


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    with pytest.raises(StorageUnavailable, match="cannot be reached") as caught:
        open_objects("s3://bucket").ping()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("connects", [True, False], ids=["says nothing", "takes no connection"])
def test_whoever_has_a_person_waiting_is_told_in_time(connects: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64 if connects else 0) as silent:
        address = silent.getsockname()
        waiting = [] if connects else [_connecting(address) for _ in range(4)]  # more than there is room for
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{address[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
        objects = open_objects("s3://bucket", within=0.2)
        began = time.monotonic()
        for ask in (lambda: objects.put_if_absent("key", b"x"), lambda: objects.get("key"), objects.ping):
            with pytest.raises(StorageUnavailable):
                ask()
        assert time.monotonic() - began < 10  # a single patient attempt takes longer than these together
        for each in waiting:
            each.close()


def _connecting(address: tuple[str, int]) -> socket.socket:
    opened = socket.socket()
    opened.setblocking(False)
    opened.connect_ex(address)
    return opened


def test_work_that_nobody_waits_for_is_patient(serve: Serve) -> None:
    server, patient = serve((200, ""))
    prompt = open_objects("s3://bucket/prefix", within=0.2)
    server.answering.clear()
    writing = threading.Thread(target=patient.put, args=("key", b"x"))
    writing.start()
    assert server.asked.wait(60)
    with pytest.raises(StorageUnavailable):
        prompt.put("key", b"x")
    assert writing.is_alive()  # it has outlasted somebody who began later
    server.answering.set()
    writing.join(60)
    assert not writing.is_alive()
