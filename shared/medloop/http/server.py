"""The server process: slow clients, too many connections, and how it stops.

uvicorn has no limit on headers, on the time they take, on the time that an answer waits for its reader, or on
connections that have no request yet (it would answer 503 to everybody once there are too many); what it lacks is added
to its protocol here.
"""

import asyncio
import errno
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Literal, Protocol, TypeVar

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from medloop.auth import check_exposure
from medloop.errors import InvalidRequest, MedLoopError, PortInUse
from medloop.http.app import App, Readiness
from medloop.http.joined import Joined
from medloop.log import configure_logging
from medloop.settings import DEFAULT_PORTS, ServerSettings, read_settings

logger = logging.getLogger(__name__)

IDLE_SECONDS = 30
"""How long a connection may stay open without a request."""
FINISH_SECONDS = 12
"""How long accepted requests have to finish once the service stops; what is left of STOP_SECONDS is for its parts."""
LINGER_SECONDS = 1.0
MAX_HEADER_BYTES = 64 * 2**10
"""Of one request, its address included; browsers and proxies send up to 8–16 KiB."""


class Settings(Protocol):
    """What every service's settings have."""

    @property
    def server(self) -> ServerSettings: ...


Given = TypeVar("Given", bound=Settings)


def run(service: str, read: Callable[[], Given], create: Callable[[Given], App]) -> int:
    """The whole of a service's `main`: read its settings, make its application, serve; returns the exit status.

    What is wrong is said in one sentence on standard error.
    """
    try:
        settings = read_settings(read)
        serve(create(settings), service, settings.server, DEFAULT_PORTS[service])
    except MedLoopError as exc:
        sys.stderr.write(f"{exc.detail}\n")
        return exc.exit_status
    return 0


def serve(app: App, service: str, settings: ServerSettings, port: int) -> None:
    """Run `app` until SIGINT or SIGTERM; accepted requests finish first."""
    configure_logging(service, settings.log_level)
    check_exposure(app.access.settings, settings.host)
    server = Server(app, settings, port)
    sockets = _listen(server.config.host, server.config.port)  # before anything is loaded
    try:
        server.run(sockets)
    except KeyboardInterrupt:  # uvicorn's way to say that Ctrl-C ended it, after everything was closed
        return
    if not server.started:
        sys.exit(uvicorn.config.STARTUP_FAILURE)


def _listen(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of `host`, bound and not yet listening; raises PortInUse and InvalidRequest."""
    bound: list[socket.socket] = []
    try:
        fault: OSError | None = None
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((info[0], info[4]) for info in found):
            try:
                bound.append(_bind(family, address))
            except OSError as exc:
                if exc.errno == errno.EADDRINUSE:
                    raise
                fault = exc  # a name may stand for an address of IPv6 where there is none
        if fault is not None and not bound:
            raise fault
    except OSError as exc:
        for each in bound:
            each.close()
        if exc.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"Port {port} of {host} is in use: stop what listens there, or set MEDLOOP_PORT to another."
            ) from exc
        raise InvalidRequest(
            f"Nothing can listen on port {port} of {host} ({exc.strerror}): set MEDLOOP_HOST to an address of this "
            "machine, and MEDLOOP_PORT to a port that this user may use."
        ) from exc
    logger.info("listening on %s, port %d", host, port)
    return bound


def _bind(family: socket.AddressFamily, address: Any) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        # A port that only lingers from a closed connection is free.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


class Server(uvicorn.Server):
    """uvicorn, with the limits of `settings`; on SIGTERM the service is not ready any more, and stops after
    `drain_seconds`."""

    def __init__(self, app: App, settings: ServerSettings, port: int) -> None:
        self.readiness: Readiness = app.readiness
        self.settings = settings
        self.stops_at: float | None = None

        class Connection(_Connection):
            limits = settings

        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port if settings.port is not None else port,
                http=Connection,
                ws="none",
                interface="asgi3",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=app.access.settings.proxy,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=FINISH_SECONDS,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGTERM and self.stops_at is None and self.settings.drain_seconds > 0:
            self._captured_signals.append(sig)
            self.readiness.drain(self.settings.drain_seconds)
            self.stops_at = time.monotonic() + self.settings.drain_seconds
        else:  # at once; asked twice, too
            self.readiness.drain()
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        if self.stops_at is not None and time.monotonic() >= self.stops_at:
            self.should_exit = True
        return await super().on_tick(counter)


class _HeadersTooLarge(Exception):
    """Ends the parser's work on a request; the parser wraps it in an error of its own."""


class _Connection(HttpToolsProtocol):
    """uvicorn's protocol on httptools, which cuts off who sends headers too slowly or too many of them or does not read
    what is answered, and refuses connections above the limit."""

    limits: ServerSettings

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._late: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._heard = False
        self._reading: Literal["nothing", "headers", "body"] = "nothing"
        self._began = False
        self._header_bytes = 0
        self._oversized = False
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self.transport = Joined(transport, self.loop)
        if len(self.connections) > self.limits.max_connections:
            self._refuse(b"503 Service Unavailable", b"There are too many connections; try again later.")
            self.transport.close()
        else:
            self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._expect_reading()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._expect_reading()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._expect_reading()

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        self._began, self._heard = False, True
        super().data_received(data)
        if self._refused or self.transport.is_closing():
            return
        if self._reading == "headers" and not self._began:
            # A header that never ends is not told to `on_header`.
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                self._refuse_headers()
                return
        # After an answer anything may come: the rest of a body that nobody read, or a request's first bytes.
        if self._late is None and self.cycle is not None and self.cycle.response_complete:
            self._expect_headers()

    def on_message_begin(self) -> None:
        self._reading, self._began, self._header_bytes = "headers", True, 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._reading = "body"
        self._stop_waiting()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._reading = "nothing"
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        if self._oversized:
            self._refuse_headers()
        else:
            super().send_400_response(msg)

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > MAX_HEADER_BYTES:
            self._oversized = True
            raise _HeadersTooLarge

    def _expect_headers(self) -> None:
        self._late = self.loop.call_later(self.limits.body_seconds, self._too_late)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _too_late(self) -> None:
        self._late = None
        if self.cycle is not None and self._reading != "headers":
            self.transport.close()  # it was answered before, and nothing is asked now
            self._expect_reading()
        elif not self.transport.is_closing():
            self._refuse(b"408 Request Timeout", b"The headers of the request did not arrive in time.")

    def _expect_reading(self) -> None:
        """While an answer waits for the client, or is the last thing that the connection is kept for, some of it must
        be taken every now and then. A client that still sends is not hung up on: it may read when it is through."""
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
        if self.flow.write_paused or self.transport.is_closing():
            self._heard = False
            size = self.transport.get_write_buffer_size()
            self._unread = self.loop.call_later(self.limits.body_seconds, self._check_reading, size)

    def _check_reading(self, before: int) -> None:
        self._unread = None
        if self._heard or self.transport.get_write_buffer_size() < before:
            self._expect_reading()
        else:
            self.transport.abort()

    def _refuse_headers(self) -> None:
        self._refuse(b"431 Request Header Fields Too Large", b"The headers of the request are too large.")

    def _refuse(self, status: bytes, why: bytes) -> None:
        """Answer before there is a request that an application could answer, and hang up.

        What the client still sends is read and thrown away for a while: closing on it would reset the connection,
        and the answer would be lost.
        """
        self._refused = True
        self._stop_waiting()
        length = str(len(why)).encode()
        head = [b"HTTP/1.1 " + status, b"content-type: text/plain", b"content-length: " + length, b"connection: close"]
        self.transport.write(b"\r\n".join([*head, b"", why]))
        self.transport.write_eof()
        self._late = self.loop.call_later(LINGER_SECONDS, self.transport.abort)
