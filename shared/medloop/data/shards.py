"""Decoded pixels in objects: what a cache on this machine's disk is, for versions that the disk has no room for.

    decoded/<data set>-<spec>/<split>-<number>.u8

An object is a shard: prepared images of one split, as many as fit into `SHARD_BYTES`, in the manifest's order, uint8
[n, S, S, C], and behind them the CRC-32 (4 bytes, little endian) of what they are and of themselves. Whoever comes
first stores it; one that is damaged or gone is made anew from the stored images. The test split has none, since nobody
trains on it.

Rows of a manifest lie in the order of their hashes, so that a shard is a random sample of its split.
"""

import logging
import secrets
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from queue import SimpleQueue
from typing import Final

import numpy as np
from numpy.typing import NDArray

from medloop.data.cache import prepare_rows
from medloop.data.manifest import Manifest, Split
from medloop.data.parallel import ProgressFn, workers_for
from medloop.errors import NotFound, StorageFull, StorageUnavailable
from medloop.storage.objects import ObjectStore
from medloop.vision.prepare import PreparationSpec

log = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]
Rows = NDArray[np.int64]

FORMAT_VERSION: Final = 1
SHARD_BYTES: Final = 8 * 2**20
"""Of pixels at most: large enough that a request for it is mostly transfer."""
SMALLEST_MEMORY: Final = 36 * SHARD_BYTES
"""Bytes that streaming takes at least: two windows of the trainer's sampler, and a little for a second stream."""
PATIENCE: Final = 300.0
"""Seconds for which objects may be away before reading gives up."""
_STREAMED: Final[tuple[Split, ...]] = ("train", "val", "calibration")
_ASIDE: Final = 4  # shards that a stream beside the one that trains may hold
_AHEAD: Final = 4096  # batches looked ahead at most
_POLL: Final = 0.2  # seconds between questions to somebody who waits for a shard
_DIGITS: Final = 16  # of each id in a key
_SUM: Final = 4  # bytes


@dataclass(frozen=True)
class Layout:
    """Where the rows of a version lie: `shard` int32 [N] and `place` in it int32 [N], both -1 for test rows.

    A shard's rows are `order[bounds[i] : bounds[i + 1]]`, ascending; `names` is the last part of its key. All have
    `shard_bytes` of pixels at most.
    """

    shard_bytes: int
    shard: NDArray[np.int32]
    place: NDArray[np.int32]
    order: Rows
    bounds: tuple[int, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, indices: Mapping[Split, Rows], image_bytes: int, shard_bytes: int = SHARD_BYTES) -> "Layout":
        """`indices` are the rows of each split, ascending, all splits together the whole version."""
        size = max(1, shard_bytes // image_bytes)
        total = sum(len(rows) for rows in indices.values())
        shard, place = np.full((2, total), -1, dtype=np.int32)
        sizes, names = [0], list[str]()
        for split in _STREAMED:
            rows = indices[split]
            shard[rows] = len(names) + np.arange(len(rows)) // size
            place[rows] = np.arange(len(rows)) % size
            starts = range(0, len(rows), size)
            names += [f"{split}-{number:05d}" for number in range(len(starts))]
            sizes += [min(size, len(rows) - start) for start in starts]
        order = np.concatenate([indices[split] for split in _STREAMED])
        return cls(shard_bytes, shard, place, order, tuple(accumulate(sizes)), tuple(names))

    def rows(self, shard: int) -> Rows:
        return self.order[self.bounds[shard] : self.bounds[shard + 1]]


class Shards:
    """The prepared images of a version, read from `objects` when they are asked for; indexed by rows like an array
    uint8 [N, S, S, C], which it has the `shape` of. Rows of the test split raise IndexError.

    `memory` bounds the bytes of shards that are held or under way at once. Reading may raise `StorageUnavailable`, once
    objects have been away for `patience` seconds and were asked every `pause` seconds, and what making a shard does.
    """

    def __init__(
        self,
        manifest: Manifest,
        spec: PreparationSpec,
        objects: ObjectStore,
        layout: Layout,
        memory: int,
        *,
        patience: float = PATIENCE,
        pause: float = 2.0,
    ) -> None:
        self.shape = (len(manifest.rows), spec.size, spec.size, spec.channels)
        self.layout = layout
        self._manifest, self._spec, self._objects = manifest, spec, objects
        self._held = max(2 * _ASIDE, memory // layout.shard_bytes)
        self._patience, self._pause = patience, pause
        self._away = False  # and it was said
        self._folder = f"decoded/{manifest.id[:_DIGITS]}-{spec.digest()[:_DIGITS]}/"

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Rows | slice, /) -> Pixels:
        """Copies of `rows`, in their order; few, or slowly: a shard is read for them and forgotten."""
        rows = np.arange(len(self))[rows] if isinstance(rows, slice) else rows
        found = np.empty((len(rows), *self.shape[1:]), dtype=np.uint8)
        shards = self.layout.shard[rows]
        order = np.argsort(shards, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(shards[order])) + 1) if len(rows) else []
        for places, (_, pixels) in zip(groups, self.stream((rows[g] for g in groups), aside=True), strict=True):
            found[places] = pixels
        return found

    def missing_bytes(self) -> int:
        """What `make` would store."""
        numbers = self._missing()
        return int(np.prod(self.shape[1:])) * sum(len(self.layout.rows(number)) for number in numbers)

    def make(self, progress: ProgressFn | None = None, workers: int | None = None) -> None:
        """Store the shards that are not there.

        Raises `StorageFull`, `StorageUnavailable`, and `NotFound` or `InvalidImage` when an image of the version is
        gone or damaged.
        """
        missing = self._missing()
        # Processes that begin together begin at different places, and so share the work.
        turn = secrets.randbelow(len(missing)) if missing else 0
        total = len(self.layout.order)
        done = total - sum(len(self.layout.rows(number)) for number in missing)
        for number in missing[turn:] + missing[:turn]:
            if not self._objects.exists(self._key(number)):
                self.store(number, self._prepared(number, workers))
            done += len(self.layout.rows(number))
            if progress:
                progress("decoding images", done, total)

    def store(self, number: int, pixels: Pixels) -> bool:
        """Store the pixels uint8 [n, S, S, C] of a shard unless it is there; whether it was not."""
        return self._objects.put_if_absent(self._key(number), self._packed(number, pixels))

    def stream(
        self, batches: Iterable[Rows], between: Callable[[], object] = lambda: None, *, aside: bool = False
    ) -> Iterator[tuple[Rows, Pixels]]:
        """Each of `batches` with its pixels, in their order.

        Threads read ahead what the next ones need, as far as memory allows; a batch that needs more by itself gets it.
        While it waits for them `between` is called several times a second, and may raise to end it. A stream beside
        another one is read `aside`: with a few shards of memory, which the other leaves it.
        """
        room = _ASIDE if aside else self._held - _ASIDE
        shelf = _Shelf(self._read, min(room, workers_for(self._objects)))
        following, ahead = _with_shards(batches, self.layout), deque[tuple[Rows, list[int]]]()
        users: Counter[int] = Counter()
        try:
            pulled = next(following, None)
            while pulled or ahead:
                while pulled and len(ahead) < _AHEAD:
                    new = [shard for shard in pulled[1] if not users[shard]]
                    if ahead and len(users) + len(new) > room:
                        break
                    for shard in new:
                        shelf.order(shard)
                    users.update(pulled[1])
                    ahead.append(pulled)
                    pulled = next(following, None)
                rows, needed = ahead.popleft()
                yield rows, self._gathered(rows, {shard: shelf.take(shard, between) for shard in needed})
                users.subtract(needed)
                for shard in needed:
                    if not users[shard]:
                        del users[shard]
                        shelf.drop(shard)
        finally:
            shelf.close()

    def _gathered(self, rows: Rows, found: Mapping[int, Pixels]) -> Pixels:
        pixels = np.empty((len(rows), *self.shape[1:]), dtype=np.uint8)
        shards = self.layout.shard[rows]
        for shard, content in found.items():
            mine = shards == shard
            pixels[mine] = content[self.layout.place[rows[mine]]]
        return pixels

    def _read(self, number: int, closed: threading.Event) -> Pixels:
        """A shard's pixels uint8 [n, S, S, C]. While objects are away it is tried again, until `closed` is set."""
        end = time.monotonic() + self._patience
        while True:
            try:
                pixels = self._fetched(number)
            except StorageUnavailable as exc:
                if time.monotonic() + self._pause > end or closed.is_set():
                    raise
                if not self._away:
                    log.warning("waiting for objects: %s", exc)
                self._away = True
                closed.wait(self._pause)
            else:
                self._away = False
                return pixels

    def _fetched(self, number: int) -> Pixels:
        try:
            pixels = self._unpacked(number, self._objects.get(self._key(number)))
            fault = "it is damaged"
        except NotFound:
            pixels, fault = None, "it is gone"
        if pixels is None:
            log.warning("a shard of decoded images is made anew: %s", fault, extra={"dataset_id": self._manifest.id})
            pixels = self._prepared(number)
            try:
                self._objects.put(self._key(number), self._packed(number, pixels))
            except (StorageFull, StorageUnavailable) as exc:
                log.warning("the shard was not stored, and the next run makes it again: %s", exc)
        return pixels

    def _prepared(self, number: int, workers: int | None = None) -> Pixels:
        rows = [self._manifest.rows[i] for i in self.layout.rows(number).tolist()]
        content = b"".join(prepare_rows(rows, self._spec, self._objects, workers=workers))
        return np.frombuffer(content, dtype=np.uint8).reshape(len(rows), *self.shape[1:])

    def _packed(self, number: int, pixels: Pixels) -> bytes:
        return b"".join((pixels.data, self._sum(number, pixels.data).to_bytes(_SUM, "little")))

    def _unpacked(self, number: int, data: bytes) -> Pixels | None:
        """None unless it is what `_packed` gave for this very shard."""
        shape = (len(self.layout.rows(number)), *self.shape[1:])
        content = memoryview(data)[:-_SUM]
        if len(content) != np.prod(shape) or self._sum(number, content).to_bytes(_SUM, "little") != data[-_SUM:]:
            return None
        return np.frombuffer(content, dtype=np.uint8).reshape(shape)

    def _sum(self, number: int, content: memoryview) -> int:
        about = f"{FORMAT_VERSION} {self._manifest.id} {self._spec.digest()} {self.layout.names[number]} "
        return zlib.crc32(content, zlib.crc32(about.encode()))

    def _missing(self) -> list[int]:
        stored = set(self._objects.list(self._folder))
        return [number for number in range(len(self.layout.names)) if self._key(number) not in stored]

    def _key(self, number: int) -> str:
        return f"{self._folder}{self.layout.names[number]}.u8"


def _with_shards(batches: Iterable[Rows], layout: Layout) -> Iterator[tuple[Rows, list[int]]]:
    for rows in batches:
        needed: list[int] = np.unique(layout.shard[rows]).tolist()
        if -1 in needed:
            raise IndexError("images of the test split lie in no shard")
        yield rows, needed


class _Shelf:
    """Shards that were ordered, brought by threads in that order.

    `read` is told by the event that nobody waits any more. The threads are daemons: storage that hangs must not keep a
    process that was told to stop.
    """

    def __init__(self, read: Callable[[int, threading.Event], Pixels], threads: int) -> None:
        self._read = read
        self._orders: SimpleQueue[int | None] = SimpleQueue()
        self._brought: dict[int, Pixels | BaseException] = {}
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name="medloop-shards", daemon=True) for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def order(self, shard: int) -> None:
        self._orders.put(shard)

    def take(self, shard: int, between: Callable[[], object]) -> Pixels:
        """Wait for an ordered shard; raises what reading it did."""
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: shard in self._brought, _POLL):
                    found = self._brought[shard]
                    break
            between()
        if isinstance(found, BaseException):
            raise found
        return found

    def drop(self, shard: int) -> None:
        with self._changed:
            del self._brought[shard]

    def close(self) -> None:
        """Let the threads end as soon as they can, and forget everything."""
        self._closed.set()
        for _ in self._threads:
            self._orders.put(None)
        with self._changed:
            self._brought.clear()

    def _work(self) -> None:
        while (shard := self._orders.get()) is not None and not self._closed.is_set():
            self._bring(shard)

    def _bring(self, shard: int) -> None:
        found: Pixels | BaseException
        try:
            found = self._read(shard, self._closed)
        except BaseException as exc:  # noqa: BLE001  it is raised where somebody waits for the shard
            found = exc
        with self._changed:
            if not self._closed.is_set():
                self._brought[shard] = found
            self._changed.notify_all()
