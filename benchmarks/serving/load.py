"""The load generator: one process, one thread, epoll, requests that lie ready.

`closed_loop` keeps a number of requests in flight, as patient clients do; `open_loop` sends at a rate, whatever the
server makes of it. Both are meant to run in a process of their own (`medloop`-free, so that it starts quickly).
"""

import selectors
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.serving.wire import Answer, Connection

GIVE_UP_S = 60.0
"""A server that has not answered anything for this long is stuck; the benchmark ends instead of waiting."""


@dataclass(slots=True)
class Outcome:
    """What came of a load. `latencies` (seconds) and `statuses` are in the order of the answers, `indices` say which
    request each belongs to, `bodies` are kept where asked for. `failed` requests got no answer at all; `unsent` are
    those of an open loop that no connection was left for. `cpu_s` is what the generator itself spent."""

    latencies: list[float] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    failed: int = 0
    unsent: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0

    def add(self, index: int, answer: Answer, latency: float, keep: bool) -> None:
        self.latencies.append(latency)
        self.statuses.append(answer.status)
        self.indices.append(index)
        if keep:
            self.bodies.append(answer.body)


class _Pool:
    """Connections to one port, and which exchange each is in: (index of the request, when it was due)."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._selector = selectors.DefaultSelector()
        self._busy: dict[Connection, tuple[int, float]] = {}
        self._idle: list[Connection] = []

    @property
    def in_flight(self) -> int:
        return len(self._busy)

    def send(self, index: int, request: bytes, due: float) -> None:
        connection = self._idle.pop() if self._idle else self._open()
        self._busy[connection] = (index, due)
        if not connection.begin(request):
            self._selector.modify(connection, selectors.EVENT_READ | selectors.EVENT_WRITE)

    def _open(self) -> Connection:
        connection = Connection(self._port)
        self._selector.register(connection, selectors.EVENT_READ)
        return connection

    def events(self, timeout: float) -> Iterator[tuple[int, float, Answer | None]]:
        """Exchanges that ended: (index, due, answer), None where the connection broke instead."""
        for key, mask in self._selector.select(timeout):
            connection = key.fileobj
            assert isinstance(connection, Connection)  # noqa: S101 - nothing else is registered
            if mask & selectors.EVENT_WRITE:
                self._push(connection)
            if mask & selectors.EVENT_READ:
                yield from self._pull(connection)

    def _push(self, connection: Connection) -> None:
        if connection.push():
            self._selector.modify(connection, selectors.EVENT_READ)

    def _pull(self, connection: Connection) -> Iterator[tuple[int, float, Answer | None]]:
        try:
            answer = connection.pull()
        except OSError:
            self._drop(connection)
            if connection in self._busy:
                yield (*self._busy.pop(connection), None)
            return
        if answer is None:
            return
        exchange = self._busy.pop(connection)
        if answer.closes or connection.sending:
            self._drop(connection)
        else:
            self._idle.append(connection)
        yield (*exchange, answer)

    def _drop(self, connection: Connection) -> None:
        self._selector.unregister(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        connection.close()

    def close(self) -> None:
        for connection in [*self._idle, *self._busy]:
            connection.close()
        self._selector.close()


def closed_loop(
    port: int, requests: Sequence[bytes], clients: int, seconds: float | None = None, keep: bool = False
) -> Outcome:
    """`clients` requests in flight, for `seconds` over and over, or each request once; whatever was sent is awaited."""
    outcome, pool = Outcome(), _Pool(port)
    began, cpu = time.perf_counter(), time.process_time()
    until = began + seconds if seconds is not None else None
    sent = 0

    def send_next() -> None:
        nonlocal sent
        now = time.perf_counter()
        if (now < until) if until is not None else (sent < len(requests)):
            index = sent % len(requests)
            sent += 1
            pool.send(index, requests[index], now)

    for _ in range(clients):
        send_next()
    heard = began
    while pool.in_flight:
        for index, due, answer in pool.events(1.0):
            heard = time.perf_counter()
            if answer is None:
                outcome.failed += 1
            else:
                outcome.add(index, answer, heard - due, keep)
            send_next()
        if time.perf_counter() - heard > GIVE_UP_S:
            outcome.failed += pool.in_flight
            break
    pool.close()
    outcome.wall_s, outcome.cpu_s = time.perf_counter() - began, time.process_time() - cpu
    return outcome


def open_loop(
    port: int, requests: Sequence[bytes], rate: float, seconds: float, connections: int = 2000, patience: float = 15.0
) -> Outcome:
    """`rate` requests a second for `seconds`, evenly spaced, then up to `patience` seconds for what is still out.

    Latency counts from when a request was due, so that a generator that comes late hides nothing.
    """
    outcome, pool = Outcome(), _Pool(port)
    began, cpu = time.perf_counter(), time.process_time()
    total, sent = int(rate * seconds), 0
    while (now := time.perf_counter() - began) < seconds + patience and (sent < total or pool.in_flight):
        while sent < total and sent / rate <= now:
            if pool.in_flight < connections:
                pool.send(sent % len(requests), requests[sent % len(requests)], began + sent / rate)
            else:
                outcome.unsent += 1
            sent += 1
        wait = max(0.0, began + sent / rate - time.perf_counter()) if sent < total else 0.5
        for index, due, answer in pool.events(wait):
            if answer is None:
                outcome.failed += 1
            else:
                outcome.add(index, answer, time.perf_counter() - due, False)
    outcome.failed += pool.in_flight
    pool.close()
    outcome.wall_s, outcome.cpu_s = time.perf_counter() - began, time.process_time() - cpu
    return outcome
