"""The spool: what is still to be recorded, on this machine's disk, bounded.

Every process has a folder of its own below the spool's (`0`, `1`, …), held by a lock that the kernel lets go of when
the process ends; the next process takes the folder over with what lies in it, and what other ended processes left is
adopted. In it lie segments, files of frames that are only ever appended to, and deleted once all of it was delivered.

What `append` has returned for survives the end of the process in whatever way, since the kernel has it. A power
failure may take what was not yet synced: segments are synced while they cannot be delivered (`sync`, which whoever
delivers calls after each failure) and on closing, never by `append`, which would make answers wait for the disk.
"""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from medloop.schemas import new_id

from medloop_inference.claim import claim_folder, hold
from medloop_inference.frames import join_frames, parse_frames

logger = logging.getLogger(__name__)

MAX_BYTES = 256 * 2**20
SEGMENT_BYTES = 4 * 2**20
"""A segment that has grown to this is closed: what one takes at a time, a few thousand predictions without images."""
_REFUSED_BYTES = 16 * 2**20
"""What is refused is kept for people to look at, up to this."""
_DAMAGED_BYTES = 64 * 2**20
"""What cannot be read is kept for people to look at, up to this for all processes together."""
_SEGMENT = "[0-9]" * 16 + ".frames"


@dataclass(slots=True, eq=False)
class _Stored:
    """A segment on disk; `frames` is None until somebody has counted those of an ended process."""

    path: Path
    size: int
    frames: int | None = 0
    synced: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """What was taken from the spool: `payloads` in the order they were appended. `whole` is false where a part of it
    could not be read."""

    payloads: list[bytes]
    whole: bool
    stored: _Stored


class Spool:
    """A queue of payloads in a folder below `root`, for any number of threads that append and one that takes.

    Nothing here raises for what the disk does: what cannot be kept is dropped and counted, and tried anew with the
    next. `problem` says why, until something was kept again; `dropped`, `torn` (frames that a kill cut off) and
    `damaged` (segments of which a part cannot be read, kept aside as `*.damaged`, the oldest of which go: `removed`)
    count since the start. `write` is `os.write` or, in tests, something that fails like a full disk.
    """

    def __init__(
        self,
        root: Path,
        max_bytes: int = MAX_BYTES,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        damaged_bytes: int = _DAMAGED_BYTES,
        write: Callable[[int, memoryview], int] = os.write,
    ) -> None:
        self._root, self._max_bytes, self._segment_bytes, self._write = root, max_bytes, segment_bytes, write
        self._damaged_bytes = damaged_bytes
        self._lock = threading.Lock()
        self._folder: Path | None = None
        self._folder_lock = -1
        self._sealed: deque[_Stored] = deque()
        self._active: _Stored | None = None
        self._descriptor = -1
        self._bytes = 0
        self._number = 0
        self._closed = False
        self.problem: str | None = None
        self.dropped = self.torn = self.damaged = self.removed = self.refused = 0
        self._told = 0  # of those dropped

    @property
    def waiting(self) -> int:
        """How many payloads lie here, those of segments that were taken and not yet discarded among them."""
        with self._lock:
            return sum(stored.frames or 0 for stored in self._all())

    @property
    def size(self) -> int:
        """How many bytes lie here, of at most the bound."""
        return self._bytes

    def append(self, payloads: Sequence[bytes]) -> bool:
        """Keep the payloads, all or none, with one write; False when they were dropped."""
        data = join_frames(payloads)
        with self._lock:
            problem = self._append(data, len(payloads))
            if problem is not None:
                self.dropped += len(payloads)
                if self.problem is None:
                    logger.warning("spool: %s", problem)
            elif lost := self.dropped - self._told:
                self._told = self.dropped
                logger.error("spool: keeps predictions again; lost for good meanwhile: %d", lost)
            self.problem = problem
        return problem is None

    def take(self) -> Segment | None:
        """The oldest segment; the same one until it is discarded, None when nothing waits. The segment that is being
        written is closed if there is no other."""
        while True:
            with self._lock:
                if not self._claimed():
                    return None
                if not self._sealed and self._active is not None and self._active.frames:
                    self._seal()
                oldest = self._sealed[0] if self._sealed else None
                uncounted = [stored for stored in self._sealed if stored.frames is None]
            for stored in uncounted:
                stored.frames = len(_read(stored.path))
            if oldest is None:
                return None
            try:
                parsed = parse_frames(oldest.path.read_bytes())
            except OSError as exc:
                logger.warning("spool: a segment cannot be read: %s", exc.strerror)
                self.discard(Segment([], False, oldest))
                continue
            self.torn += parsed.torn
            return Segment(parsed.payloads, not parsed.damaged, oldest)

    def discard(self, segment: Segment) -> None:
        """Forget a segment that was delivered; one that was not whole is kept aside."""
        with self._lock:
            if self._closed or segment.stored not in self._sealed:
                return  # the folder may be another process's by now
            self._sealed.remove(segment.stored)
            self._bytes -= segment.stored.size
            path = segment.stored.path
            try:
                if segment.whole:
                    path.unlink(missing_ok=True)
                    return
                self.damaged += 1
                # Segments are counted anew by each process, so a name of its own is needed; these sort by age.
                aside = path.with_name(f"{new_id()}.damaged")
                logger.error("spool: a part of %s cannot be read; it is kept as %s", path.name, aside.name)
                path.rename(aside)
                self._bound_damaged()
            except OSError as exc:
                # The next process delivers it again, which changes nothing.
                logger.warning("spool: a segment that was delivered cannot be removed: %s", exc.strerror)

    def _bound_damaged(self) -> None:
        kept = sorted(self._root.glob("[0-9]*/*.damaged"), key=lambda path: path.name)
        sizes = [path.stat().st_size for path in kept]
        over = sum(sizes) - self._damaged_bytes
        for path, size in zip(kept, sizes, strict=True):
            if over <= 0:
                return
            path.unlink(missing_ok=True)
            self.removed += 1
            over -= size
            logger.error("spool: %s, which could not be read, gives way to newer ones", path.name)

    def refuse(self, payload: bytes) -> None:
        """Keep a payload that will never be delivered aside in the file `refused`, and count it."""
        with self._lock:
            self.refused += 1
            if self._folder is None:
                return
            data = join_frames([payload])
            try:
                descriptor = os.open(self._folder / "refused", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                try:
                    if os.fstat(descriptor).st_size + len(data) <= _REFUSED_BYTES:
                        self._write_all(descriptor, data)
                finally:
                    os.close(descriptor)
            except OSError as exc:
                logger.warning("spool: what records refused cannot be kept: %s", exc.strerror)

    def sync(self) -> None:
        """Wait until the disk has all that was appended, so that a power failure does not take it."""
        with self._lock:
            unsynced = [stored for stored in self._all() if not stored.synced]
            paths = [stored.path for stored in unsynced]
            for stored in unsynced:
                stored.synced = stored is not self._active
            if self._folder is not None and paths:
                paths.append(self._folder)
        for path in paths:
            try:
                _sync(path)
            except FileNotFoundError:
                continue  # delivered meanwhile
            except OSError as exc:
                logger.warning("spool: the disk does not confirm what was written: %s", exc.strerror)

    def adopt(self) -> int:
        """Take over what ended processes left below the same root, as far as half the bound allows; how many
        segments."""
        adopted = 0
        with self._lock:
            if not self._claimed() or self._folder is None:
                return 0
            try:
                for folder in sorted(self._root.iterdir()):
                    if folder != self._folder and folder.name.isdigit():
                        adopted += self._adopt(self._folder, folder)
            except OSError as exc:
                logger.warning("spool: what other processes left cannot be looked at: %s", exc.strerror)
        return adopted

    def close(self) -> None:
        """Sync what is left, for whoever takes the folder over."""
        with self._lock:
            if self._active is not None:
                self._seal()
            self._closed = True
        self.sync()
        with self._lock:
            if self._folder is not None:
                os.close(self._folder_lock)
                self._folder = None

    def _all(self) -> list[_Stored]:
        return [*self._sealed, *([self._active] if self._active is not None else [])]

    def _append(self, data: bytes, frames: int) -> str | None:
        """Write one run of frames; says what was in the way."""
        if self._closed:
            return "The service is stopping."
        if self._bytes + len(data) > self._max_bytes:
            return f"The spool {self._root} holds its {self._max_bytes:,} bytes; bring records and objects back."
        try:
            active = self._opened()
            self._write_all(self._descriptor, data)
        except OSError as exc:
            self._cut_back()
            reason = exc.strerror or type(exc).__name__
            return f"The spool {self._root} cannot be written ({reason}); free some space or check the folder."
        active.size += len(data)
        self._bytes += len(data)
        active.frames = (active.frames or 0) + frames
        if active.size >= self._segment_bytes:
            self._seal()
        return None

    def _write_all(self, descriptor: int, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._write(descriptor, rest) :]

    def _cut_back(self) -> None:
        """Remove what a failed write left of itself."""
        if self._active is None:
            return
        try:
            os.ftruncate(self._descriptor, self._active.size)
        except OSError:
            self._seal()  # behind a torn frame nothing may follow

    def _opened(self) -> _Stored:
        """The segment that is written to, made if there is none."""
        if self._active is None:
            path = self._new_path(self._folder or self._claim())
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            self._descriptor = os.open(path, flags, 0o600)
            self._active = _Stored(path, 0)
        return self._active

    def _seal(self) -> None:
        if self._active is not None:
            os.close(self._descriptor)
            self._sealed.append(self._active)
            self._active = None

    def _new_path(self, folder: Path) -> Path:
        self._number += 1
        return folder / f"{self._number:016d}.frames"

    def _claimed(self) -> bool:
        """Whether this process has its folder, which is tried for if not."""
        if self._folder is None and not self._closed:
            try:
                self._claim()
            except OSError as exc:
                self.problem = f"The spool {self._root} cannot be used ({exc.strerror}); check the folder."
        return self._folder is not None and not self._closed

    def _claim(self) -> Path:
        """Take the first folder that no living process holds, and what lies in it; returns it."""
        folder, held = claim_folder(self._root)
        found = _segments(folder)
        self._folder, self._folder_lock = folder, held
        self._sealed.extend(found)
        self._bytes += sum(stored.size for stored in found)
        self._number = max((int(stored.path.stem) for stored in found), default=0)
        self.problem = None
        return folder

    def _adopt(self, own: Path, folder: Path) -> int:
        held = hold(folder)
        if held is None:
            return 0
        adopted = 0
        try:
            for stored in _segments(folder):
                if self._bytes + stored.size > self._max_bytes // 2:
                    break
                path = self._new_path(own)
                stored.path.rename(path)
                stored.path = path
                self._sealed.append(stored)
                self._bytes += stored.size
                adopted += 1
        finally:
            os.close(held)
        return adopted


def _segments(folder: Path) -> list[_Stored]:
    return [_Stored(path, path.stat().st_size, None) for path in sorted(folder.glob(_SEGMENT))]


def _read(path: Path) -> list[bytes]:
    """The payloads of a segment, as far as they can be read; `take` says when they cannot."""
    try:
        return parse_frames(path.read_bytes()).payloads
    except OSError:
        return []


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
