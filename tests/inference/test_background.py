"""Work beside the requests goes on whatever happens to it, and can be told to come last."""

import os
import sys
import threading
from collections.abc import Callable

import pytest
from medloop.errors import StorageUnavailable
from medloop_inference.background import Neighbours, Periodic


def test_work_goes_on_after_it_failed_and_ends_when_told() -> None:
    turns = threading.Semaphore(0)

    def work() -> None:
        turns.release()
        raise ValueError("this time it failed")

    periodic = Periodic("test", work, seconds=0.001)
    periodic.start()
    assert all(turns.acquire(timeout=30) for _ in range(3))
    periodic.stop()
    assert "test" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a priority for each thread")
def test_only_work_that_yields_comes_last() -> None:
    found: dict[str, int] = {}
    done = threading.Barrier(3, timeout=30)

    def note(name: str) -> Callable[[], None]:
        def work() -> None:
            found[name] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
            done.wait()

        return work

    here = os.getpriority(os.PRIO_PROCESS, 0)
    both = [Periodic("usual", note("usual"), 60), Periodic("yielding", note("yielding"), 60, yielding=True)]
    for periodic in both:
        periodic.start()
    done.wait()
    for periodic in both:
        periodic.stop()
    assert found["usual"] == here == os.getpriority(os.PRIO_PROCESS, 0)
    assert found["yielding"] > here or here >= 10


def test_a_neighbour_is_named_while_it_does_not_answer() -> None:
    down = True

    def check() -> None:
        if down:
            raise StorageUnavailable("It is down.")

    neighbours = Neighbours({"objects": check, "records": lambda: None})
    neighbours.check_once()
    assert neighbours.degraded == {"objects": "It is down."}
    down = False
    neighbours.check_once()
    assert neighbours.degraded == {}
