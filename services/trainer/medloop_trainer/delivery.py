"""Delivery: a thread that sends to MLflow what is spooled, in batches, so that training never waits for it."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from medloop.errors import Conflict, NotFound, StorageFull, StorageUnavailable, TrackingUnavailable
from medloop.registry import Registry, translated

from medloop_trainer.spool import SUFFIX, Entry, Spool

log = logging.getLogger(__name__)

INTERVAL = 1.0
"""Seconds between two batches at least: a request costs milliseconds of the interpreter that training wants, too."""
LONGEST_PAUSE = 30.0
"""Seconds between two attempts while MLflow is away, at most."""


def deliver(registry: Registry, run_id: str, spool: Spool) -> int:
    """Send all that waits; how many entries. Raises TrackingUnavailable as soon as MLflow does not answer."""
    count = 0
    while (batch := spool.take()) is not None:
        _send(registry, run_id, batch.entries, spool)
        spool.acknowledge(batch)
        count += len(batch.entries)
    return count


def deliver_leftovers(registry: Registry, folder: Path) -> None:
    """Send what other runs, whose processes have ended, left in `folder`. Raises TrackingUnavailable."""
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        spool = Spool(path)
        try:
            spool.claim()
            if spool.pending:
                with translated(registry.tracking_uri, f"Run {path.stem}"):
                    registry.client.get_run(path.stem)
                log.warning("delivered what MLflow had not received of run %s", path.stem)
                deliver(registry, path.stem, spool)
        except Conflict:
            continue  # that run goes on
        except NotFound as exc:
            log.warning("%s What was tracked of it stays in %s; delete that if the run is not wanted.", exc, path)
        except (StorageFull, StorageUnavailable) as exc:
            log.warning("what an earlier run left cannot be delivered: %s", exc)
        finally:
            spool.close()


def _send(registry: Registry, run_id: str, entries: Sequence[Entry], spool: Spool) -> None:
    try:
        _send_together(registry, run_id, entries)
    except NotFound as exc:
        # MLflow's word for whatever it will never take; one such entry must not hold up the others.
        if len(entries) == 1:
            spool.refuse(entries[0], str(exc.__cause__ or exc))
            return
        for entry in entries:
            _send(registry, run_id, [entry], spool)


def _send_together(registry: Registry, run_id: str, entries: Sequence[Entry]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

    metrics = [Metric(name, value, entry.at, entry.step) for entry in entries for name, value in entry.metrics.items()]
    params = {name: value for entry in entries for name, value in entry.params.items()}
    tags = {name: value for entry in entries for name, value in entry.tags.items()}
    client = registry.client
    with translated(registry.tracking_uri, f"Run {run_id}"):
        client.log_batch(
            run_id, metrics, [Param(*item) for item in params.items()], [RunTag(*item) for item in tags.items()]
        )
        for entry in entries:
            if (found := entry.dataset) is not None:
                dataset = Dataset(
                    found.name, found.digest, found.source_type, found.source, found.columns, found.profile
                )
                client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
            if entry.status is not None:
                client.set_terminated(run_id, entry.status, entry.at)


class Courier:
    """The thread: it delivers what earlier runs left beside `spool`, then what comes into `spool`, until `stop`.

    While MLflow is away it tries again after `interval` seconds, then ever more rarely.
    """

    def __init__(self, registry: Registry, run_id: str, spool: Spool, *, interval: float = INTERVAL) -> None:
        self._registry, self._run_id, self._spool, self._interval = registry, run_id, spool, interval
        self._changed = threading.Condition()
        self._stopping = self._urgent = self._away = False
        self.problem: Exception | None = None
        """Why the last attempt failed."""
        self.seconds = 0.0
        """Processor time that the thread has taken so far."""
        self._broken = False
        # A daemon: an MLflow that hangs must not keep a process that was told to stop.
        self._thread = threading.Thread(target=self._work, name="medloop-tracking", daemon=True)
        self._thread.start()

    def notice(self) -> None:
        """Something came into the spool."""
        with self._changed:
            self._changed.notify_all()

    def drain(self, patience: float) -> bool:
        """Wait for up to `patience` seconds until all has arrived; whether it has."""
        with self._changed:
            self._urgent = True
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self._broken or not self._spool.pending, patience)
            finally:
                self._urgent = False
        return not self._spool.pending

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(timeout=self._interval)

    def _work(self) -> None:
        try:
            self._attempt(lambda: deliver_leftovers(self._registry, self._spool.path.parent))
            pause = self._interval
            while self._something_to_do():
                if self._attempt(lambda: deliver(self._registry, self._run_id, self._spool)):
                    pause = self._interval
                    self._rest(pause, urgently=0)
                else:
                    self._rest(pause, urgently=self._interval)
                    pause = min(2 * pause, LONGEST_PAUSE)
        except Exception as exc:
            # Nobody can catch what a thread raises: whoever waits for delivery is told, the spool keeps the rest.
            log.exception("tracking stopped; what is not delivered stays in %s", self._spool.path)
            with self._changed:
                self.problem, self._broken = exc, True
                self._changed.notify_all()

    def _something_to_do(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._spool.pending)
            return not self._stopping

    def _attempt(self, work: Callable[[], object]) -> bool:
        try:
            work()
        except TrackingUnavailable as exc:
            self._spool.sync()
            if not self._away:
                log.warning("what is tracked waits in %s until MLflow is back: %s", self._spool.path.parent, exc)
            self._away, self.problem = True, exc
            return False
        finally:
            self.seconds = time.thread_time()
        if self._away:
            log.warning("MLflow is back and has what was spooled")
        self._away, self.problem = False, None
        return True

    def _rest(self, seconds: float, *, urgently: float) -> None:
        """Wait for `seconds`, or for `urgently` seconds while somebody drains."""
        started = time.monotonic()
        with self._changed:
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._stopping or self._urgent, seconds)
            if self._urgent:
                left = started + urgently - time.monotonic()
                self._changed.wait_for(lambda: self._stopping, max(0.0, left))
