"""Threads that keep the order and do not read ahead without bound."""

import threading
from collections.abc import Iterator

import pytest
from medloop.data.parallel import batched, ordered_map
from medloop.errors import InvalidImage


def test_results_come_in_order() -> None:
    overtaken = threading.Event()

    def slow_at_first(number: int) -> int:
        if number == 0:
            assert overtaken.wait(30)
        elif number == 1:
            overtaken.set()
        return number * number

    assert list(ordered_map(slow_at_first, range(50), workers=4)) == [i * i for i in range(50)]


def test_little_is_read_ahead() -> None:
    drawn = []

    def items() -> Iterator[int]:
        for i in range(100):
            drawn.append(i)
            yield i

    results = ordered_map(lambda i: i, items(), workers=2)
    assert next(results) == 0
    assert len(drawn) <= 4
    results.close()  # type: ignore[attr-defined]


def test_an_error_comes_up_at_its_place_and_ends_the_threads() -> None:
    def work(number: int) -> int:
        if number == 3:
            raise InvalidImage("three")
        return number

    results = ordered_map(work, range(1000), workers=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InvalidImage, match="three"):
        next(results)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("medloop-data")]


def test_batches() -> None:
    assert list(batched(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(batched((), 2)) == []
