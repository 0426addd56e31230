"""Nobody is let in who could not be answered in time, and batches grow only while answers come in time."""

import pytest
from medloop.errors import Overloaded
from medloop_inference.admission import HEADROOM, Admission, Pace
from medloop_inference.settings import QueueSettings


def admission(**limits: float) -> Admission:
    return Admission(QueueSettings.model_validate({"target_ms": 1000, **limits}))


def test_the_predicted_wait_decides() -> None:
    door = admission()
    door.ran(10, 1.0)  # a tenth of a second for each
    door.images = int(HEADROOM * 10)
    door.check()
    door.images += 1
    with pytest.raises(Overloaded) as refused:
        door.check()
    assert refused.value.retry_after >= 1
    door.images = 100  # ten seconds of work
    with pytest.raises(Overloaded) as refused:
        door.check()
    assert refused.value.retry_after == 10


def test_who_comes_alone_is_always_let_in() -> None:
    door = admission(target_ms=1)
    door.ran(1, 5.0)
    door.check()
    door.hold(2**40)


def test_count_and_bytes_are_bounded_whatever_the_wait() -> None:
    door = admission(queue_images=3, queue_bytes=100)
    door.ran(1000, 0.001)
    door.images = 3
    with pytest.raises(Overloaded):
        door.check()
    door.hold(60)
    with pytest.raises(Overloaded):
        door.hold(60)
    door.release(60)
    door.hold(100)


def test_the_guess_gives_way_to_what_was_measured() -> None:
    door = admission()
    door.ran(4, 0.4)
    assert door.seconds_per_image == pytest.approx(0.1)
    for _ in range(100):
        door.ran(1, 0.2)
    assert door.seconds_per_image == pytest.approx(0.2, rel=1e-3)


def test_the_batch_grows_while_full_batches_are_in_time_and_halves_when_late() -> None:
    pace = Pace(target_ms=100)
    for _ in range(500):
        pace.observe([0.01] * pace.limit)
    assert pace.limit == Pace.LARGEST
    for _ in range(40):
        pace.observe([0.5] * pace.limit)
    assert pace.limit < Pace.LARGEST
    for _ in range(1000):
        pace.observe([0.5] * pace.limit)
    assert pace.limit == Pace.SMALLEST


def test_batches_that_are_not_full_say_nothing_for_larger_ones() -> None:
    pace = Pace(target_ms=100)
    for _ in range(500):
        pace.observe([0.01] * (pace.limit - 1))
    assert pace.limit == Pace.FIRST


def test_a_batch_takes_a_tenth_of_the_target_at_most() -> None:
    pace = Pace(target_ms=1000)
    for _ in range(100):
        pace.ran(pace.limit, 0.04 * pace.limit)
        pace.observe([0.2] * pace.limit)
    assert pace.limit == 2  # of 40 ms each
    for _ in range(100):
        pace.ran(pace.limit, 0.001 * pace.limit)
        pace.observe([0.2] * pace.limit)
    assert pace.limit == Pace.LARGEST
    pace = Pace(target_ms=1000)
    pace.ran(1, 3.0)
    assert pace.limit == Pace.SMALLEST
