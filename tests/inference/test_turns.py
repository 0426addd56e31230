"""Requests that wait for blocking work are answered in time, and what hangs takes no more than its threads."""

import threading
from collections.abc import Iterator

import anyio
import pytest
from medloop.errors import NotFound, Overloaded, Unavailable
from medloop_inference.turns import Turns

pytestmark = pytest.mark.anyio

LONG = 60.0


@pytest.fixture
def turns() -> Iterator[Turns]:
    made = Turns("things", 1, 1)
    yield made
    made.close()


async def test_it_gives_what_the_work_gives(turns: Turns) -> None:
    def fails() -> None:
        raise NotFound("It is not there.")

    assert await turns.take(lambda: 7, LONG) == 7
    with pytest.raises(NotFound):
        await turns.take(fails, LONG)


async def test_what_has_not_begun_in_time_never_does(turns: Turns) -> None:
    release, begun, done = threading.Event(), threading.Event(), []

    def hang() -> None:
        begun.set()
        assert release.wait(LONG)
        done.append("first")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(turns.take, hang, LONG)
        await anyio.to_thread.run_sync(begun.wait)
        with pytest.raises(Unavailable, match=r"0\.1 s were not enough"):
            await turns.take(lambda: done.append("second"), 0.1)
        release.set()
    await turns.take(lambda: done.append("third"), LONG)
    assert done == ["first", "third"]


async def test_whoever_comes_when_too_many_wait_is_sent_away_at_once(turns: Turns) -> None:
    release, begun = threading.Event(), threading.Semaphore(0)

    def hang() -> None:
        begun.release()
        assert release.wait(LONG)

    async with anyio.create_task_group() as tasks:
        for _ in range(2):
            tasks.start_soon(turns.take, hang, LONG)
        await anyio.to_thread.run_sync(begun.acquire)
        with pytest.raises(Overloaded, match="1 things wait already"):
            await turns.take(hang, LONG)
        release.set()
