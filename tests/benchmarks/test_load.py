"""The load generator against a server that is small enough to see through."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from medloop.testing import free_port

from benchmarks.serving.load import closed_loop, open_loop
from benchmarks.serving.wire import multipart, request_bytes


class Echo(BaseHTTPRequestHandler):
    """Answers with the body it got, chunked or with a length; counts how many requests it holds at once."""

    protocol_version = "HTTP/1.1"
    held: ClassVar[list[int]] = []
    holding: ClassVar[set[int]] = set()
    seconds: ClassVar[float] = 0.0

    def do_POST(self) -> None:
        self.holding.add(id(self))
        self.held.append(len(self.holding))
        body = self.rfile.read(int(self.headers["content-length"]))
        time.sleep(self.seconds)
        self.holding.discard(id(self))
        if self.path == "/broken":
            self.close_connection = True
            return
        self.send_response(429 if self.path == "/refused" else 200)
        if self.path == "/chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            half = len(body) // 2
            for piece in (body[:half], body[half:], b""):
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            return
        if self.path == "/last":
            self.send_header("Connection", "close")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Be silent."""


@contextmanager
def echo(seconds: float = 0.0) -> Iterator[int]:
    Echo.held.clear()
    Echo.seconds = seconds
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("path", ["/", "/chunked", "/last"])
def test_each_answer_belongs_to_its_request(path: str) -> None:
    bodies = [json.dumps({"number": n, "filling": "x" * 3000 * n}).encode() for n in range(40)]
    with echo() as port:
        outcome = closed_loop(port, [request_bytes(path, b, "application/json") for b in bodies], 5, keep=True)
    assert sorted(outcome.indices) == list(range(40))
    assert [bodies[index] for index in outcome.indices] == outcome.bodies
    assert set(outcome.statuses) == {200}
    assert not outcome.failed


def test_a_closed_loop_keeps_as_many_in_flight_as_it_has_clients() -> None:
    with echo(0.1) as port:
        outcome = closed_loop(port, [request_bytes("/", b"x", "text/plain")], 4, seconds=0.5)
    assert max(Echo.held) == 4
    assert len(outcome.latencies) == len(Echo.held)
    assert min(outcome.latencies) >= 0.1
    assert outcome.cpu_s < outcome.wall_s / 2  # a twentieth is usual: it waits without spinning


def test_an_open_loop_sends_at_its_rate_whatever_the_server_does() -> None:
    request = request_bytes("/refused", b"x", "text/plain")
    with echo(0.1) as port:
        outcome = open_loop(port, [request], rate=100, seconds=0.5)
    assert outcome.statuses == [429] * 50
    assert max(Echo.held) > 4  # it did not wait for answers
    assert min(outcome.latencies) >= 0.1


def test_an_open_loop_without_connections_left_says_so() -> None:
    with echo(2.0) as port:  # so that none comes back while others are sent
        outcome = open_loop(port, [request_bytes("/", b"x", "text/plain")], rate=100, seconds=0.2, connections=3)
    assert len(outcome.statuses) == 3
    assert outcome.unsent == 17


def test_a_broken_connection_is_a_failure_and_not_an_answer() -> None:
    with echo() as port:
        outcome = closed_loop(port, [request_bytes("/broken", b"x", "text/plain")] * 3, 1)
    assert (outcome.failed, outcome.statuses) == (3, [])
    assert closed_loop(free_port(), [request_bytes("/", b"x", "text/plain")], 1).failed == 1


def test_a_form_holds_the_file() -> None:
    body, content_type = multipart("file", "image.png", b"\x89PNG\r\n\0", "image/png")
    message = message_from_bytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + body)
    part = next(part for part in message.walk() if not part.is_multipart())
    assert part.get_payload(decode=True) == b"\x89PNG\r\n\0"
    assert part.get_param("name", header="content-disposition") == "file"
