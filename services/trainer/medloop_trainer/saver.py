"""Checkpoints are stored by a thread of their own, so that training waits neither for a disk nor for a network."""

import logging
import threading
import time
from types import TracebackType
from typing import Self

from medloop.errors import MedLoopError

from medloop_trainer.checkpoint import Checkpoints, Snapshot

log = logging.getLogger(__name__)

PAUSE_S = 5.0
"""Least time between the beginnings of two writes: what a kill can cost, against what writing costs."""


class Saver:
    """Stores what it is offered, the newest first of all: one may wait, and gives way to a newer one.

    Objects that cannot be reached, are full or refuse stop no training: it is logged, and the next offer is the next
    attempt. What else goes wrong in the thread, which is a fault of ours, comes up at the next call.
    """

    def __init__(self, checkpoints: Checkpoints, pause: float = PAUSE_S) -> None:
        self.checkpoints = checkpoints
        self._pause = pause
        self._changed = threading.Condition()
        self._waiting: Snapshot | None = None
        self._closing = False
        self._failure: BaseException | None = None
        self._storing = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="medloop-checkpoints", daemon=True)
        self._thread.start()

    def offer(self, snapshot: Snapshot) -> None:
        """Have `snapshot` stored soon; returns at once."""
        with self._changed:
            self._raise_failure()
            self._waiting = snapshot
            self._changed.notify()

    def flush(self, *snapshots: Snapshot) -> bool:
        """Store `snapshots`, oldest first, instead of what waits; returns whether all of them are stored now."""
        with self._changed:
            self._raise_failure()
            self._waiting = None
        stored = [self._store(snapshot) for snapshot in snapshots]  # the later ones also where an earlier fails
        return all(stored)

    def close(self) -> None:
        """Store what waits, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if error is None:
            self._raise_failure()

    def _run(self) -> None:
        try:
            while (snapshot := self._next()) is not None:
                begun = time.monotonic()
                self._store(snapshot)
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, begun + self._pause - time.monotonic())
        except BaseException as exc:  # noqa: BLE001  it is raised in the thread that trains
            with self._changed:
                self._failure = exc

    def _next(self) -> Snapshot | None:
        """What waits, as soon as something does; None when there will be nothing more."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._closing)
            snapshot, self._waiting = self._waiting, None
            return snapshot

    def _store(self, snapshot: Snapshot) -> bool:
        try:
            with self._storing:
                self.checkpoints.save(snapshot)
        except MedLoopError as exc:
            what = "was not stored" if snapshot.key is None else "is stored, but older ones may be left"
            log.warning("the checkpoint of step %d %s: %s", snapshot.state.step, what, exc.detail)
        return snapshot.key is not None

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
