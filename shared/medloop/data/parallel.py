"""Work in threads, results in order, memory bounded: decoding and storage wait for C code and disks, not for Python."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Final, TypeVar

from medloop.storage.objects import ObjectStore

Item = TypeVar("Item")
Result = TypeVar("Result")

NETWORK_WORKERS: Final = 16

ProgressFn = Callable[[str, int, int], None]
"""Called with the step's name, how much is done, and how much there is in all."""


def ordered_map(
    work: Callable[[Item], Result], items: Iterable[Item], *, workers: int | None = None
) -> Iterator[Result]:
    """`map(work, items)` in threads, reading ahead by no more than a few items a worker.

    An exception of `work` or of `items` comes up at its place and ends the iteration; what was started is awaited,
    what was not is dropped. `workers` defaults to the number of processors: with small images, whose handling is half
    Python, more threads only wait for each other.
    """
    count = workers or os.cpu_count() or 1
    executor = ThreadPoolExecutor(count, thread_name_prefix="medloop-data")
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(executor.submit(work, item))
            if len(pending) >= 2 * count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def workers_for(objects: ObjectStore) -> int:
    """How many threads keep a store busy: S3 answers after milliseconds in which a processor has nothing to do."""
    return NETWORK_WORKERS if objects.url.startswith("s3:") else os.cpu_count() or 1


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one perhaps shorter (`itertools.batched` came with Python 3.12)."""
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch
