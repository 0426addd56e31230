"""The server process as clients see it, over real sockets."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, Request, Response
from medloop.auth import AuthSettings
from medloop.http import App, Readiness, create_app
from medloop.http.server import Server, run
from medloop.settings import ServerSettings
from medloop.testing import free_port

pytestmark = pytest.mark.anyio

LARGE = 32 * 2**20
"""Bytes: more than the system takes in for a connection that nobody reads from."""


@asynccontextmanager
async def serving(**settings: float) -> AsyncIterator[int]:
    """Run the real server in this loop; yields its port."""
    async with running(**settings) as server:
        yield server.config.port


@asynccontextmanager
async def running(**settings: float) -> AsyncIterator[Server]:
    server = make_server(port=free_port(), **settings)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield server
    finally:
        server.should_exit = True
        await task


def make_server(**settings: float) -> Server:
    router = APIRouter()

    @router.post("/length")
    async def length(request: Request) -> int:
        return len(await request.body())

    @router.get("/large")
    async def large() -> Response:
        return Response(bytes(LARGE))

    chosen = ServerSettings.model_validate(settings)
    return Server(create_app("test", chosen, routers=[router], readiness=Readiness()), chosen, 0)


async def send(port: int, *parts: bytes, pause: float = 0.0) -> bytes:
    """Write `parts` with a pause between them; returns all that comes back until the server hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = asyncio.create_task(reader.read())
    try:
        for part in parts:
            if answer.done():
                break
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause)
        return await asyncio.wait_for(answer, 30)
    except ConnectionError:  # it hung up while we wrote; what it had said before is still there
        return await asyncio.wait_for(answer, 30)
    finally:
        writer.close()


HEAD = b"POST /length HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n"


async def test_a_body_that_dribbles_gets_408_and_nobody_else_waits() -> None:
    async with serving(body_seconds=1.0) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        slow = asyncio.create_task(send(port, HEAD % 100 + b"\r\n", *[b"x"] * 100, pause=0.05))
        await asyncio.sleep(0.2)
        assert (await client.post("/length", content=b"abc")).json() == 3
        answer = await slow
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"body-too-slow" in answer
        assert b"connection: close" in answer
        assert 'route="/length",status="408"' in (await client.get("/metrics")).text


@pytest.mark.parametrize("parts", [[], [HEAD % 3, *[b"X-%d: 1\r\n" % i for i in range(60)]], [b"\r\n"] * 60])
async def test_headers_that_do_not_come_end_the_connection(parts: list[bytes]) -> None:
    async with serving(body_seconds=0.4) as port:
        assert (await send(port, *parts, pause=0.05)).startswith(b"HTTP/1.1 408")


async def test_bytes_after_an_answer_do_not_keep_a_connection_for_ever() -> None:
    async with serving(body_seconds=1.0, max_body_bytes=10) as port:
        livez = b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        answer = await send(port, livez, *[b"\r\n"] * 60, pause=0.05)
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    "parts",
    [
        [HEAD % 3 + b"X-Long: ", *[b"y" * 8192] * 12],
        [HEAD % 3 + b"X-Long: " + b"y" * 70_000 + b"\r\n\r\n"],
        [HEAD % 3 + b"".join(b"X-%d: 1\r\n" % i for i in range(20_000))],
        [b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n"],
    ],
)
async def test_headers_without_end_are_refused(parts: list[bytes]) -> None:
    async with serving() as port:
        assert (await send(port, *parts)).startswith(b"HTTP/1.1 431")


async def test_many_requests_share_a_connection_whatever_was_refused_before() -> None:
    large = b"z" * 200_000
    async with serving(max_body_bytes=300_000) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        for _ in range(3):
            assert (await http.post("/length", content=large)).json() == len(large)
            # Answered before its body was read.
            refused = await http.post("/length", content=large, headers={"host": "evil.example"})
            assert refused.status_code == 403
            assert "connection" not in refused.headers


@pytest.mark.parametrize("kept", ["keep-alive", "close"])
async def test_who_does_not_read_an_answer_does_not_keep_the_connection(kept: str) -> None:
    async with running(body_seconds=0.4) as server:
        with socket.socket() as unread:
            unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            unread.connect(("127.0.0.1", server.config.port))
            unread.sendall(b"GET /large HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: %s\r\n\r\n" % kept.encode())
            async with asyncio.timeout(10):
                while server.server_state.total_requests < 1 or server.server_state.connections:
                    await asyncio.sleep(0.01)


class Wire(asyncio.Transport):
    """What a connection writes to: as much is `left` to be sent as a test says."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.closing, self.aborted = 0, False, False

    def get_write_buffer_size(self) -> int:
        return self.left

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = self.aborted = True


class Timers:
    """Stands for an event loop: its time is up when a test says so."""

    def __init__(self) -> None:
        self.due: list[tuple[asyncio.TimerHandle, Callable[..., None], tuple[Any, ...]]] = []

    def call_later(self, delay: float, call: Callable[..., None], *given: Any) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(delay, call, given, asyncio.get_running_loop())
        self.due.append((handle, call, given))
        return handle

    def pass_time(self) -> None:
        due, self.due = self.due, []
        for handle, call, given in due:
            if not handle.cancelled():
                call(*given)


@pytest.fixture
async def connection() -> AsyncIterator[tuple[Any, Wire, Timers]]:
    server, wire, timers = make_server(), Wire(), Timers()
    server.config.load()
    protocol: Any = server.config.http_protocol_class
    made = protocol(server.config, server.server_state, {}, timers)
    made.connection_made(wire)
    timers.due.clear()  # of the headers that do not come
    yield made, wire, timers
    made.connection_lost(None)


async def test_a_slow_reader_and_one_that_still_sends_are_waited_for(connection: tuple[Any, Wire, Timers]) -> None:
    protocol, wire, timers = connection
    wire.left = 100_000
    protocol.pause_writing()
    for _ in range(3):
        wire.left -= 1
        timers.pass_time()
    protocol.data_received(b"GET")
    timers.pass_time()
    assert not wire.aborted
    timers.pass_time()
    assert wire.aborted


async def test_what_is_left_of_an_answer_keeps_a_closed_connection_no_longer(
    connection: tuple[Any, Wire, Timers],
) -> None:
    protocol, wire, timers = connection
    wire.left = 100_000
    protocol.pause_writing()
    wire.left = 10_000
    protocol.resume_writing()
    timers.pass_time()
    timers.pass_time()
    assert not wire.aborted, "the connection is kept for whatever is asked next"
    protocol.timeout_keep_alive_handler()
    wire.left = 9_000
    timers.pass_time()
    assert not wire.aborted
    timers.pass_time()
    assert wire.aborted


async def test_connections_above_the_limit_are_refused_and_those_below_go_on() -> None:
    async with serving(max_connections=2) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        assert (await client.get("/livez")).status_code == 200
        _, idle = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.sleep(0.05)
        assert (await send(port)).startswith(b"HTTP/1.1 503")
        assert (await client.get("/livez")).status_code == 200
        idle.close()


def test_settings_that_cannot_be_end_in_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDLOOP_PORT", "many")

    class Given:
        def __init__(self) -> None:
            self.server = ServerSettings()

    status = run("evaluator", Given, lambda _: pytest.fail("made an application"))
    assert status == 3
    assert capsys.readouterr().err.startswith("MEDLOOP_PORT is not set as it must be: ")


@pytest.mark.parametrize(
    ("host", "status", "says"),
    [("127.0.0.1", 11, "Port {port} of 127.0.0.1 is in use: "), ("192.0.2.1", 3, "Nothing can listen on port {port} ")],
)
def test_a_place_that_cannot_be_listened_on_ends_in_one_sentence(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, host: str, status: int, says: str
) -> None:
    class Given:
        def __init__(self) -> None:
            self.server = ServerSettings()

    def create(given: Given) -> App:
        auth = AuthSettings(auth="proxy")
        return create_app("test", given.server, routers=[], readiness=Readiness(), auth=auth)

    monkeypatch.setattr("medloop.http.server.configure_logging", lambda *_: None)  # it is this process's own, too
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("MEDLOOP_PORT", str(port))
        monkeypatch.setenv("MEDLOOP_HOST", host)
        assert run("evaluator", Given, create) == status
    said = capsys.readouterr().err
    assert said.startswith(says.format(port=port))
    assert said.count("\n") == 1


SCRIPT = """
import asyncio, sys
from pathlib import Path
from fastapi import APIRouter
from medloop.http import Readiness, create_app, serve
from medloop.settings import ServerSettings

router = APIRouter()

@router.get("/slow")
async def slow() -> str:
    print("accepted", flush=True)
    while not Path(sys.argv[1]).exists():
        await asyncio.sleep(0.01)
    return type(asyncio.get_running_loop()).__module__

readiness = Readiness()
readiness.passed()
settings = ServerSettings()
serve(create_app("test", settings, routers=[router], readiness=readiness), "test", settings, 0)
"""


@contextmanager
def process(port: int, go_on: Path) -> Iterator[subprocess.Popen[str]]:
    """A service that drains for three seconds, in which it is told so; its slow answer waits for the file `go_on`."""
    environment = {**os.environ, "MEDLOOP_PORT": str(port), "MEDLOOP_DRAIN_SECONDS": "3"}
    command = [sys.executable, "-c", SCRIPT, str(go_on)]
    started = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_sigterm_finishes_what_was_accepted_and_sends_newcomers_away(home: Path) -> None:
    port, go_on = free_port(), home / "go on"
    with process(port, go_on) as server, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:

        def ready() -> int | None:
            try:
                return client.get("/readyz").status_code
            except httpx.TransportError:
                return None

        eventually(lambda: ready() == 200)
        with socket.create_connection(("127.0.0.1", port)) as accepted:
            accepted.sendall(b"GET /slow HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert server.stdout is not None
            assert server.stdout.readline() == "accepted\n"
            server.send_signal(signal.SIGTERM)
            eventually(lambda: ready() == 503)
            draining, alive = client.get("/readyz"), client.get("/livez")
            go_on.touch()
            accepted.settimeout(60)
            answer = b"".join(iter(lambda: accepted.recv(4096), b""))
        ended = server.wait(timeout=60)
    assert (draining.status_code, draining.json()["reason"]) == (503, "draining")
    assert (alive.status_code, alive.headers["connection"]) == (200, "close")
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"connection: close" in answer
    assert b'"uvloop"' in answer
    assert ended == -signal.SIGTERM
