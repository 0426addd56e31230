"""Blocking work that requests wait for: some at once, some more that wait for their turn, and nobody for too long."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import TypeVar

from medloop.errors import Overloaded, Unavailable

Result = TypeVar("Result")


class Turns:
    """Threads for `at_once` requests of a kind (`name`, in the plural), while `waiting` more may wait. `take` is called
    on one event loop's thread, `close` on any."""

    def __init__(self, name: str, at_once: int, waiting: int) -> None:
        self._name, self._at_once, self._waiting = name, at_once, waiting
        self._places = asyncio.Semaphore(at_once)
        self._in_hand = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    async def take(self, call: Callable[[], Result], within: float) -> Result:
        """What `call` returns or raises. Raises Overloaded when too many wait already, and Unavailable once closed and
        after `within` seconds: what has not begun by then never does, and nothing keeps it; what hangs keeps its
        thread until it ends."""
        if self._in_hand >= self._at_once + self._waiting:
            raise Overloaded(f"{self._waiting} {self._name} wait already; send this again later.")
        self._loop = asyncio.get_running_loop()
        self._in_hand += 1
        try:
            async with asyncio.timeout(within):
                await self._places.acquire()
                return await self._begin(call)
        except TimeoutError as exc:
            raise Unavailable(
                f"A store is slow or hangs: {within:g} s were not enough; send this again later."
            ) from exc
        finally:
            self._in_hand -= 1

    def close(self) -> None:
        """Begin nothing more: whoever waits is told. Does not wait for what is under way."""
        self._closed = True
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended, and so has whoever waited
                # One place more, which each that waits takes, learns of the end by, and hands on.
                self._loop.call_soon_threadsafe(self._places.release)

    def _begin(self, call: Callable[[], Result]) -> "asyncio.Future[Result]":
        """Start `call` in a thread that gives the place back."""
        if self._closed:
            self._places.release()
            raise Unavailable("The service is stopping: send this again.")
        answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        # A daemon, and none of a pool's, which Python waits for when it ends.
        thread = threading.Thread(
            target=copy_context().run, args=(self._run, call, answer), name=self._name, daemon=True
        )
        try:
            thread.start()
        except RuntimeError as exc:
            self._places.release()
            raise Unavailable("This machine starts no more threads now; send this again later.") from exc
        return answer

    def _run(self, call: Callable[[], Result], answer: "asyncio.Future[Result]") -> None:
        try:
            settle = partial(answer.set_result, call())
        except BaseException as exc:  # noqa: BLE001  it is raised where somebody waits for the answer
            settle = partial(answer.set_exception, exc)
        with suppress(RuntimeError):  # the loop has ended, and so has whoever waited
            answer.get_loop().call_soon_threadsafe(self._settle, answer, settle)

    def _settle(self, answer: "asyncio.Future[Result]", settle: Callable[[], None]) -> None:
        self._places.release()
        if not answer.done():  # nobody gave it up
            settle()
