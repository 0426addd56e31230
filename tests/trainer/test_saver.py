import logging
import threading

import pytest
from medloop_trainer.checkpoint import Checkpoints
from medloop_trainer.saver import Saver

from .stores import DyingObjects, Killed, MemoryObjects
from .test_checkpoint import ABOUT, snapshot, steps


class SlowObjects(MemoryObjects):
    """The first write does not end before `go`."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go = threading.Event(), threading.Event()

    def _changed(self) -> None:
        super()._changed()
        self.begun.set()
        assert self.go.wait(30)


def test_nobody_waits_for_a_slow_store_and_the_newest_is_stored_next() -> None:
    objects = SlowObjects()
    with Saver(Checkpoints(objects, ABOUT), pause=0) as saver:
        saver.offer(snapshot(0))
        assert objects.begun.wait(30)
        for step in (3, 6, 9):
            saver.offer(snapshot(step))  # returns although the store stands still
        objects.go.set()
    assert steps(objects) == [0, 9]


def test_what_waits_is_stored_at_the_end_whatever_the_pause() -> None:
    objects = MemoryObjects()
    with Saver(Checkpoints(objects, ABOUT), pause=3600) as saver:
        for step in (0, 3, 6):
            saver.offer(snapshot(step))
    assert steps(objects)[-1] == 6


def test_a_store_that_is_away_is_tried_again_at_the_next(caplog: pytest.LogCaptureFixture) -> None:
    objects = MemoryObjects()
    objects.away = True
    with caplog.at_level(logging.WARNING), Saver(Checkpoints(objects, ABOUT), pause=0) as saver:
        assert not saver.flush(snapshot(0))
        assert "step 0 was not stored" in caplog.text
        objects.away = False
        assert saver.flush(snapshot(3))
    assert steps(objects) == [3]


def test_an_unexpected_failure_reaches_the_training() -> None:
    objects = DyingObjects()
    objects.die(1, after=False)
    saver = Saver(Checkpoints(objects, ABOUT), pause=0)
    saver.offer(snapshot(0))
    saver.close()
    with pytest.raises(Killed):
        saver.offer(snapshot(3))
