"""Requests that wait for blocking work are answered in time, and what hangs takes no more than its threads."""

import gc
import subprocess
import sys
import threading
import weakref
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


async def test_nothing_keeps_what_was_given_up(turns: Turns) -> None:
    class Image:
        """An upload."""

    release, begun = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        assert release.wait(LONG)

    async def give_up() -> "weakref.ref[Image]":
        image = Image()
        with pytest.raises(Unavailable):
            await turns.take(lambda: image, 0.01)
        return weakref.ref(image)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(turns.take, hang, LONG)
        await anyio.to_thread.run_sync(begun.wait)
        left = [await give_up() for _ in range(3)]
        await anyio.lowlevel.checkpoint()  # asyncio holds the last error as long as this step of the task takes
        gc.collect()  # of what an exception's frames hold in a circle
        assert [image() for image in left] == [None] * 3
        release.set()


async def test_whoever_waits_or_comes_when_it_closes_is_told(turns: Turns) -> None:
    release, begun, done = threading.Event(), threading.Event(), []

    def hang() -> str:
        begun.set()
        assert release.wait(LONG)
        return "under way"

    async def first() -> None:
        done.append(await turns.take(hang, LONG))

    async def waiting() -> None:
        with pytest.raises(Unavailable, match="is stopping"):
            await turns.take(lambda: done.append("begun"), LONG)
        done.append("told")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(first)
        await anyio.to_thread.run_sync(begun.wait)
        tasks.start_soon(waiting)
        await anyio.wait_all_tasks_blocked()
        await anyio.to_thread.run_sync(turns.close)
        await waiting()
        release.set()
    assert done == ["told", "told", "under way"]


async def test_a_thread_that_cannot_start_takes_no_place(turns: Turns, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", full)
        for _ in range(2):
            with pytest.raises(Unavailable, match="no more threads"):
                await turns.take(lambda: 7, LONG)
    assert await turns.take(lambda: 7, LONG) == 7


def test_what_hangs_keeps_no_process_from_ending() -> None:
    program = """
import asyncio, threading
from medloop.errors import Unavailable
from medloop_inference.turns import Turns

async def main():
    turns = Turns("things", 1, 1)
    try:
        await turns.take(threading.Event().wait, 0.01)
    except Unavailable:
        turns.close()
        print("told")

asyncio.run(main())
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LONG, check=True)
    assert (ended.stdout, ended.stderr) == ("told\n", "")


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
