"""Predictions asked for by many at once, through what a load balancer does and no more: each goes to the next replica
whose `/readyz` said yes a moment ago. Nothing is tried twice, so one that fails counts as failed."""

import http.client
import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from tests.deploy.compose.stack import answers

LOOK_SECONDS = 0.25
REUSE_SECONDS = 10.0
"""A connection that was not used for longer is opened anew: services close one after 30 s."""


class Balancer:
    """Replicas by container, as `host:port`; which of them are ready is looked at four times a second."""

    def __init__(self, replicas: Mapping[str, str]) -> None:
        self._replicas = dict(replicas)
        self._ready: tuple[str, ...] = ()
        self._turn = itertools.count()
        self._ended = threading.Event()
        self._look()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def moved(self, container: str, address: str) -> None:
        """A replica was started anew and listens elsewhere."""
        self._replicas = {**self._replicas, container: address}

    def is_ready(self, container: str) -> bool:
        return self._replicas[container] in self._ready

    def next(self) -> str | None:
        ready = self._ready
        return ready[next(self._turn) % len(ready)] if ready else None

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        self._ready = tuple(one for one in self._replicas.values() if answers(one, "/readyz") == 200)


class Load:
    """`callers` threads that ask about `image`, together `rate` times a second, or as often as they get answers."""

    def __init__(
        self, balancer: Balancer, image: bytes, key: str, *, callers: int = 8, rate: float | None = None
    ) -> None:
        self.answered: dict[str, str] = {}
        """By the prediction's id: what it answered."""
        self.failed: Counter[str] = Counter()
        self.balancer, self._image = balancer, image
        self._headers = {"Authorization": f"Bearer {key}", "Content-Type": "image/png"}
        self._pause = callers / rate if rate else 0.0
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._call, daemon=True) for _ in range(callers)]

    @property
    def sent(self) -> int:
        return len(self.answered) + self.failed.total()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _call(self) -> None:
        connections: dict[str, tuple[http.client.HTTPConnection, float]] = {}
        due = time.monotonic()
        while not self._ended.is_set():
            address = self.balancer.next()
            if address is None:
                self.failed["no replica was ready"] += 1
            else:
                connection, used = connections.get(address) or (http.client.HTTPConnection(address, timeout=30), 0.0)
                if time.monotonic() - used > REUSE_SECONDS:
                    connection.close()
                self._ask(connection)
                connections[address] = connection, time.monotonic()
            due = max(due + self._pause, time.monotonic() - self._pause)
            self._ended.wait(max(0.0, due - time.monotonic()))
        for connection, _ in connections.values():
            connection.close()

    def _ask(self, connection: http.client.HTTPConnection) -> None:
        try:
            connection.request("POST", "/v1/predict", self._image, self._headers)
            answer = connection.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException) as exc:
            self.failed[type(exc).__name__] += 1
            connection.close()
            return
        if answer.status == 200:
            found = json.loads(body)
            self.answered[found["id"]] = found["label"]
        else:
            self.failed[f"{answer.status} {json.loads(body).get('code', '')}"] += 1
