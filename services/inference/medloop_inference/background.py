"""Work that goes on beside the requests: something done again and again, and a look at whether the stores answer."""

import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping

from medloop.errors import MedLoopError

logger = logging.getLogger(__name__)

_NICENESS = 10
"""About a tenth of the share of a thread at 0. Not 19: a thread that has to wait may hold the interpreter's lock."""


class Periodic:
    """Does `work` in a thread of its own, at once and then `seconds` after each time it ended; with `yielding`, only
    when nobody else needs the processor."""

    def __init__(self, name: str, work: Callable[[], None], seconds: float, *, yielding: bool = False) -> None:
        self._work, self._seconds, self._yielding = work, seconds, yielding
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def begin_stop(self) -> None:
        """Begin no more work; does not wait for what is under way."""
        self._stopped.set()

    def stop(self, timeout: float = 2.0) -> None:
        """Begin no more work, and wait up to `timeout` seconds for what is under way: it may hang on a neighbour."""
        self.begin_stop()
        self._thread.join(timeout)

    def _run(self) -> None:
        if self._yielding:
            yield_processor()
        while not self._stopped.is_set():
            try:
                self._work()
            except Exception:
                # The thread is all that follows the champion: one bad turn must not end it.
                logger.exception("%s failed this time and goes on", self._thread.name)
            self._stopped.wait(self._seconds)


def yield_processor() -> None:
    """Let this thread, and those it starts, come after all others of the machine. Linux alone has a priority for each
    thread (sched(7)); elsewhere nothing happens. There is no way back."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


class Neighbours:
    """Whether the services beside us answer: `degraded` maps the name of one that does not to what it said.

    `checks` are called one after the other; each returns, or raises a MedLoopError.
    """

    def __init__(self, checks: Mapping[str, Callable[[], None]]) -> None:
        self._checks = checks
        self.degraded: dict[str, str] = {}

    def check_once(self) -> None:
        found: dict[str, str] = {}
        for name, check in self._checks.items():
            try:
                check()
            except MedLoopError as exc:
                found[name] = exc.detail
                if name not in self.degraded:
                    logger.warning("%s cannot be reached: %s", name, exc.detail)
        self.degraded = found
