"""SIGTERM: where a training runs it ends its step and stores a checkpoint; elsewhere there is nothing to wait for."""

from collections.abc import Iterator
from contextlib import contextmanager

from medloop.errors import Preempted


class Stop:
    """A signal handler that a training can ask whether it was called."""

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False

    def __call__(self, signum: int, frame: object) -> None:
        self.requested = True
        if not self._deferred:
            # As an exception that no library catches, so that the run is marked as stopped on the way out.
            raise SystemExit(Preempted.exit_status)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal is only noted."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
