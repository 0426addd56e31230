"""Prediction records: into the spool before the answer goes out, from there to records and objects in the background.

An answer waits for one write into the page cache of this machine and for nothing else.
"""

import logging
import threading
import time
from collections.abc import Sequence

from medloop.errors import MedLoopError
from medloop.storage.objects import ObjectStore
from medloop.storage.records import RecordStore

from medloop_inference.delivery import BATCH, Delivery, Entry, pack
from medloop_inference.handover import Handover
from medloop_inference.spool import Segment, Spool

logger = logging.getLogger(__name__)

_EVERY_S = 0.25
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.5, 10.0
_ADOPT_EVERY_S = 15.0


class Recorder:
    """Records predictions (kind `predictions`) through `spool`, which it closes when it is stopped; what records have
    not taken by then goes to `handover`, if there is one.

    `problem` says why nothing can be recorded or spooled at the moment; `dropped` counts entries that never will be,
    `refused` those that records do not take (kept in the spool's file `refused`), `waiting` those still on their way.
    """

    def __init__(
        self,
        records: RecordStore,
        objects: ObjectStore,
        spool: Spool,
        *,
        handover: Handover | None = None,
        first_backoff_s: float = _FIRST_BACKOFF_S,
    ) -> None:
        self._spool, self._handover, self._first_backoff_s = spool, handover, first_backoff_s
        self._delivery = Delivery(records, objects, spool.refuse)
        self._segment: Segment | None = None
        self._delivered = 0  # of the segment's payloads
        self._problem: str | None = None
        self._stopping = threading.Event()
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    @property
    def problem(self) -> str | None:
        return self._problem or self._spool.problem

    @property
    def dropped(self) -> int:
        return self._spool.dropped

    @property
    def refused(self) -> int:
        return self._spool.refused

    @property
    def waiting(self) -> int:
        return max(0, self._spool.waiting - self._delivered)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float = 15.0) -> None:
        """Deliver what waits within `timeout` seconds, of which the second half is for handing over what records did
        not take; the rest stays in the spool for the next start."""
        end = time.monotonic() + timeout
        self._deadline = end if self._handover is None else end - timeout / 2
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(max(0.0, self._deadline - time.monotonic()))
        waiting = self.waiting
        if waiting and self._handover is not None:
            self._hand_over(self._handover, end)
            waiting = self._spool.waiting  # a thread that still hangs in records may count what is gone
        self._spool.close()
        if waiting and self._handover is not None:
            logger.error("%d predictions stay in the spool, and are lost if its disk ends with this container", waiting)
        elif waiting:
            logger.warning("%d predictions stay in the spool and are recorded after the next start", waiting)
        if self.dropped:
            logger.error("%d predictions were not recorded", self.dropped)

    def record(self, entries: Sequence[Entry]) -> None:
        """Take entries to be recorded; what has no room is counted. May be called by any thread."""
        self._spool.append([pack(entry) for entry in entries])

    def _run(self) -> None:
        backoff, adopt_at = self._first_backoff_s, 0.0
        while True:
            stopping = self._stopping.is_set()
            pause = _EVERY_S
            try:
                if time.monotonic() >= adopt_at and not stopping:
                    self._spool.adopt()
                    adopt_at = time.monotonic() + _ADOPT_EVERY_S
                self._deliver_waiting()
            except MedLoopError as exc:
                self._report(exc.detail)
                pause = backoff
            except Exception:
                logger.exception("predictions cannot be recorded")
                self._report("Predictions cannot be recorded; see the log of inference.")
                pause = backoff
            else:
                self._report(None)
            if stopping:
                return
            if self._problem is None:
                backoff = self._first_backoff_s
            else:
                self._spool.sync()  # it may stay for long
                backoff = min(2 * backoff, _LONGEST_BACKOFF_S)
            self._stopping.wait(pause)

    def _report(self, problem: str | None) -> None:
        if (problem is None) != (self._problem is None):
            logger.warning("records: %s", problem or "written again")
        self._problem = problem

    def _deliver_waiting(self) -> None:
        """Deliver segment by segment until nothing waits, or the time to stop has come."""
        while time.monotonic() < self._deadline:
            if self._segment is None:
                self._segment = self._spool.take()
                if self._segment is None:
                    return
            payloads = self._segment.payloads[self._delivered : self._delivered + BATCH]
            self._delivery.deliver(payloads)
            self._delivered += len(payloads)
            if self._delivered >= len(self._segment.payloads):
                delivered, self._segment = self._segment, None
                self._delivered = 0  # before it is discarded: `waiting` may be told too much, never too little
                self._spool.discard(delivered)

    def _hand_over(self, handover: Handover, end: float) -> None:
        # In a thread, since objects may hang, and the process has to end.
        thread = threading.Thread(target=self._empty_into, args=(handover, end), name="handover", daemon=True)
        thread.start()
        thread.join(max(0.0, end - time.monotonic()))

    def _empty_into(self, handover: Handover, end: float) -> None:
        """Hand over segment by segment, each of which leaves the disk only when objects have all of it."""
        handed_over = 0
        try:
            while time.monotonic() < end and (segment := self._spool.take()) is not None:
                if not handover.put(segment.payloads, end):
                    break
                self._spool.discard(segment)
                handed_over += len(segment.payloads)
        except MedLoopError as exc:
            logger.error("what waits cannot be handed over: %s", exc.detail)  # noqa: TRY400  no traceback helps
        except Exception:
            logger.exception("what waits cannot be handed over")
        if handed_over:
            logger.warning("%d predictions lie in objects now, for any replica to record", handed_over)
