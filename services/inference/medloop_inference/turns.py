"""Blocking work that requests wait for: some at once, some more that wait for their turn, and nobody for too long."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

from medloop.errors import Overloaded, Unavailable

Result = TypeVar("Result")


class Turns:
    """Threads for `at_once` requests of a kind (`name`, in the plural), while `waiting` more may wait. `take` is called
    on one event loop's thread."""

    def __init__(self, name: str, at_once: int, waiting: int) -> None:
        self._name, self._at_once, self._waiting = name, at_once, waiting
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix=name)
        self._in_hand = 0

    async def take(self, call: Callable[[], Result], within: float) -> Result:
        """What `call` returns or raises. Raises Overloaded when too many wait already, and Unavailable after `within`
        seconds: what has not begun by then never does, what hangs keeps its thread until it ends."""
        if self._in_hand >= self._at_once + self._waiting:
            raise Overloaded(f"{self._waiting} {self._name} wait already; send this again later.")
        self._in_hand += 1
        try:
            async with asyncio.timeout(within):
                return await asyncio.wrap_future(self._threads.submit(copy_context().run, call))
        except TimeoutError as exc:
            raise Unavailable(
                f"A store is slow or hangs: {within:g} s were not enough; send this again later."
            ) from exc
        finally:
            self._in_hand -= 1

    def close(self) -> None:
        """Begin nothing more; does not wait for what is under way."""
        self._threads.shutdown(wait=False, cancel_futures=True)
