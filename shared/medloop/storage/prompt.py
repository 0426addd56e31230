"""Objects for whoever has a person waiting: an answer in time, or a clear no.

The time limits of a library bound the steps of a request (each address of a name, a handshake, each read, another
attempt, a fresh token), not their sum, and looking up a name has none. So each verb runs in a thread, which is left to
itself when its time is up.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextvars import copy_context
from itertools import islice
from typing import TypeVar

from medloop.errors import StorageUnavailable
from medloop.storage.objects import ObjectStore

Answer = TypeVar("Answer")

_PAGE = 1000  # keys: what S3 lists in one request


class PromptObjects:
    """`store`, of which each verb (of `list`, each page) returns or raises within `seconds`: `StorageUnavailable`
    where the time is up. A write that was given up may still happen.

    Of the verbs that nobody waits for any more, and those somebody does, `places` are under way at most; whoever comes
    then waits for a place, within the same time.
    """

    def __init__(self, store: ObjectStore, seconds: float, *, places: int = 32) -> None:
        self._store, self.seconds = store, seconds
        self._places = threading.BoundedSemaphore(places)

    def __repr__(self) -> str:
        return f"PromptObjects({self._store!r}, {self.seconds:g})"

    @property
    def url(self) -> str:
        return self._store.url

    def put(self, key: str, data: bytes, *, durable: bool = True) -> None:
        self._ask(lambda: self._store.put(key, data, durable=durable))

    def put_if_absent(self, key: str, data: bytes, *, durable: bool = True) -> bool:
        return self._ask(lambda: self._store.put_if_absent(key, data, durable=durable))

    def get(self, key: str, *, at_most: int | None = None) -> bytes:
        return self._ask(lambda: self._store.get(key, at_most=at_most))

    def exists(self, key: str) -> bool:
        return self._ask(lambda: self._store.exists(key))

    def list(self, prefix: str = "") -> Iterator[str]:
        return self._paged(self._store.list(prefix))

    def _paged(self, keys: Iterator[str]) -> Iterator[str]:
        while page := self._ask(lambda: tuple(islice(keys, _PAGE))):
            yield from page

    def delete(self, key: str) -> None:
        self._ask(lambda: self._store.delete(key))

    def ping(self) -> None:
        self._ask(self._store.ping)

    def _ask(self, verb: Callable[[], Answer]) -> Answer:
        """What `verb` returns or raises, if that is in time."""
        end = time.monotonic() + self.seconds
        if not self._places.acquire(timeout=self.seconds):
            raise self._too_late()
        answer: Future[Answer] = Future()
        # A daemon, and none of a pool's, which Python waits for when it ends.
        thread = threading.Thread(
            target=copy_context().run, args=(self._settle, verb, answer), name="prompt objects", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as exc:
            self._places.release()
            raise StorageUnavailable(
                f"This machine starts no more threads now, to ask the object storage at {self.url}; try again later."
            ) from exc
        if not wait([answer], max(0.0, end - time.monotonic())).done:
            raise self._too_late()
        return answer.result()

    def _settle(self, verb: Callable[[], Answer], answer: "Future[Answer]") -> None:
        try:
            answer.set_result(verb())
        except BaseException as exc:  # noqa: BLE001  it is raised where somebody waits for the answer
            answer.set_exception(exc)
        finally:
            self._places.release()

    def _too_late(self) -> StorageUnavailable:
        return StorageUnavailable(
            f"The object storage at {self.url} does not answer within {self.seconds:g} s; try again later."
        )
