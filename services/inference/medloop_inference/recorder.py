"""Prediction records: kept after the answer, by one writer thread, from a bounded queue.

An answer never waits for records. While they cannot be written the queue fills; what does not fit, and what is left
when the service must stop, is dropped and counted.
"""

import logging
import queue
import threading
from contextlib import suppress

from medloop.errors import MedLoopError, StorageFull, Unavailable
from medloop.schemas import Prediction
from medloop.storage.records import RecordStore

logger = logging.getLogger(__name__)

CAPACITY = 10_000
"""Predictions that may wait: about 20 MB, and several minutes of a busy service."""
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.5, 30.0


class Recorder:
    """Writes predictions to `records` (kind `predictions`, id as in the answer).

    `problem` says why records cannot be written at the moment, `dropped` counts predictions that will never be.
    """

    def __init__(self, records: RecordStore, capacity: int = CAPACITY) -> None:
        self._records = records
        self._waiting: queue.Queue[tuple[Prediction, str | None] | None] = queue.Queue(capacity)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self.problem: str | None = None
        self.dropped = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float = 15.0) -> None:
        """Write what still waits; when records cannot be written, drop it and say how much it was."""
        self._stopping.set()
        with suppress(queue.Full):  # then the writer hangs, and what waits is lost with what it holds
            self._waiting.put(None, timeout=timeout)
        self._thread.join(timeout)
        lost = self.dropped + (self._waiting.qsize() if self._thread.is_alive() else 0)
        if lost:
            logger.error("%d predictions were not recorded: %s", lost, self.problem or "the queue was full")

    def offer(self, prediction: Prediction, request_id: str | None) -> None:
        """Take a prediction to be recorded; never waits."""
        try:
            self._waiting.put_nowait((prediction, request_id))
        except queue.Full:
            self.dropped += 1

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            prediction, request_id = item
            try:
                written = self._write(prediction.id, prediction.model_dump(mode="json") | {"request_id": request_id})
            except Exception:
                logger.exception("a prediction cannot be recorded")
                written = False
            if not written:
                self.dropped += 1

    def _write(self, prediction_id: str, document: dict[str, object]) -> bool:
        """Try until it is written; give up when the store refuses the document, or fails while the service stops."""
        if self._stopping.is_set() and self.problem is not None:
            return False
        backoff = _FIRST_BACKOFF_S
        while True:
            try:
                self._records.put_once("predictions", prediction_id, document)
            except (Unavailable, StorageFull) as exc:
                self._report(exc.detail)
                if self._stopping.is_set():
                    return False
                self._stopping.wait(backoff)
                backoff = min(2 * backoff, _LONGEST_BACKOFF_S)
            except MedLoopError:
                self._report(None)
                logger.exception("records refused a prediction")
                return False
            else:
                self._report(None)
                return True

    def _report(self, problem: str | None) -> None:
        if (problem is None) != (self.problem is None):
            logger.warning("records: %s", problem or "written again")
        self.problem = problem
