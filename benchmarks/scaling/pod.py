"""One pod of inference: the door, the queue and the batches, with the service's own classes for the first and last.

Requests are taken one by one in the order they come; batches start as soon as one of the pod's runs is free, with what
waits then, and all of a batch is answered at its end, as in `medloop_inference.batcher`.
"""

import heapq
import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from medloop.errors import Overloaded
from medloop_inference.admission import Admission, Pace
from medloop_inference.settings import QueueSettings

Told = Callable[[float, float | None], None]
"""Told of a request: when it came, and the seconds until its answer; None where it was refused."""


@dataclass(frozen=True, slots=True)
class Work:
    """How a pod works: `batch_s` says how long so many images take one of its `at_once` runs."""

    batch_s: Callable[[int], float]
    at_once: int = 1


class Pod:
    """A pod that is ready; `target_ms` is MEDLOOP_TARGET_MS. `busy_s` counts the time its runs have worked, each for
    itself, up to what was last advanced to."""

    def __init__(self, work: Work, target_ms: float, tell: Told) -> None:
        self._work, self._tell = work, tell
        self._door = Admission(QueueSettings(target_ms=target_ms))
        self._pace = Pace(target_ms)
        self._waiting: deque[float] = deque()
        self._running: list[tuple[float, float, list[float]]] = []  # end, beginning, arrivals; by end
        self._ended = -math.inf
        self._ended_s = 0.0

    @property
    def queue_wait(self) -> float:
        """What `medloop_queue_wait_seconds` says."""
        return self._door.predicted_wait

    def busy_s(self, now: float) -> float:
        return self._ended_s + sum(now - began for _, began, _ in self._running)

    def serve(self, arrivals: Sequence[float], until: float) -> None:
        """Take requests that come at `arrivals`, ascending and before `until`, and work on until then."""
        next_one = 0
        while next_one < len(arrivals):
            at = arrivals[next_one]
            if self._running and self._running[0][0] <= at:
                self._advance(at)
            try:
                self._door.check()
            except Overloaded:
                # Who comes before the next batch ends is refused, too.
                refused_until = bisect_left(arrivals, self._running[0][0], next_one)
                for at in arrivals[next_one:refused_until]:
                    self._tell(at, None)
                next_one = refused_until
                continue
            next_one += 1
            self._door.images += 1
            self._waiting.append(at)
            if len(self._running) < self._work.at_once:
                self._start(at)
        self._advance(until)

    def finish(self) -> None:
        """Answer what was accepted."""
        self._advance(math.inf)

    def _advance(self, now: float) -> None:
        while self._running and self._running[0][0] <= now:
            end, began, batch = heapq.heappop(self._running)
            since = max(self._ended, batch[0])
            self._ended = end
            self._ended_s += end - began
            self._door.images -= len(batch)
            self._door.ran(len(batch), end - since)
            self._pace.ran(len(batch), end - began)
            self._pace.observe([end - at for at in batch])
            for at in batch:
                self._tell(at, end - at)
            self._start(end)

    def _start(self, now: float) -> None:
        while self._waiting and (idle := self._work.at_once - len(self._running)):
            size = min(self._pace.limit, math.ceil(len(self._waiting) / idle))
            batch = [self._waiting.popleft() for _ in range(size)]
            heapq.heappush(self._running, (now + self._work.batch_s(size), now, batch))
