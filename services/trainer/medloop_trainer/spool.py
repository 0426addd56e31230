"""The spool: what MLflow has not yet received of a run, `MEDLOOP_HOME/tracking/<run id>.jsonl`, a JSON object a line.

What `append` has returned for survives the end of the process in whatever way, since the kernel has it; it neither
waits for the disk nor fails for it. `sync` is called while nothing can be delivered, so that a power failure takes
nothing either. A line may be delivered twice (a process that was killed between sending and `acknowledge`), which
changes nothing: MLflow keeps a metric once for each key, step, time and value.

The file belongs to the process that holds its lock, which the kernel lets go of when that process ends.
"""

import fcntl
import itertools
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from medloop.errors import Conflict
from medloop.storage.disk import disk_errors
from pydantic import BaseModel, ConfigDict, ValidationError

log = logging.getLogger(__name__)

SUFFIX = ".jsonl"
IN_MEMORY = 10_000
"""Lines, of about 500 bytes, that are kept while the disk takes none; then the oldest go."""
_BATCH = 200
"""Lines taken at a time: MLflow takes a thousand metrics in one request, and an epoch has about ten."""


class DatasetInput(BaseModel):
    """A data set as MLflow's `Dataset` has it; `source`, `columns` (its schema) and `profile` are JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    digest: str
    source_type: str
    source: str
    columns: str
    profile: str


class Entry(BaseModel):
    """Something to be tracked: any of these together. `at` is milliseconds since 1970; `status` ends the run."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    at: int
    step: int = 0
    metrics: dict[str, float] = {}
    params: dict[str, str] = {}
    tags: dict[str, str] = {}
    dataset: DatasetInput | None = None
    status: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The oldest entries; `end` is the place behind them in the file, None where they are in memory only."""

    entries: list[Entry]
    lines: list[bytes]
    end: int | None


class Spool:
    """The queue of one run, for threads that append and one that takes, delivers and acknowledges.

    `write` is `os.write` or, in tests, something that fails like a full disk.
    """

    def __init__(self, path: Path, *, write: Callable[[int, bytes], int] = os.write) -> None:
        self.path = path
        self.lost = 0
        """Entries that neither the disk nor the memory had room for."""
        self._write = write
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._delivered = 0  # bytes
        self._unkept: deque[bytes] = deque()
        self._failing = self._closed = False

    @property
    def pending(self) -> bool:
        """Whether anything is not yet acknowledged."""
        with self._lock:
            return bool(self._unkept) or self._size() > self._delivered

    def claim(self) -> None:
        """Take over what an ended process left. Raises Conflict while another process has it, StorageFull and
        StorageUnavailable."""
        with self._lock, disk_errors(self.path):
            try:
                self._opened()
            except BlockingIOError as exc:
                raise Conflict(f"Another process is at work on the run {self.path.stem}; let it end first.") from exc

    def append(self, entry: Entry) -> None:
        """Keep an entry; what the disk does not take stays in memory and is tried again with the next."""
        line = entry.model_dump_json(exclude_defaults=True).encode() + b"\n"
        with self._lock:
            self._unkept.append(line)
            self._keep()
            if len(self._unkept) > IN_MEMORY:
                self._unkept.popleft()
                self.lost += 1

    def take(self) -> Batch | None:
        """The oldest entries; the same again until they are acknowledged, None when there are none."""
        with self._lock:
            self._keep()
            data, start = self._read(self._delivered), self._delivered
            if not data:
                lines = list(self._unkept)[:_BATCH]
                return Batch(_parsed(lines, self.path), lines, None) if lines else None
        lines = data.splitlines(keepends=True)[:_BATCH]
        return Batch(_parsed(lines, self.path), lines, start + sum(map(len, lines)))

    def acknowledge(self, batch: Batch) -> None:
        """Forget entries that were delivered."""
        with self._lock:
            if batch.end is None:
                # Those that the disk took meanwhile are delivered once more.
                for line in batch.lines:
                    if self._unkept and self._unkept[0] is line:
                        self._unkept.popleft()
            elif self._descriptor is not None:
                self._delivered = batch.end
                if self._size() == batch.end:
                    self._cut(0)

    def refuse(self, entry: Entry, reason: str) -> None:
        """Keep an entry that MLflow will never take beside the spool, for people to look at."""
        aside = self.path.with_suffix(".refused")
        log.error("MLflow refused what was to be tracked (%s); it is kept in %s", reason, aside)
        try:
            with aside.open("ab") as file:
                file.write(entry.model_dump_json(exclude_defaults=True).encode() + b"\n")
        except OSError as exc:
            log.error("what MLflow refused could not be kept (%s): %s", exc.strerror, entry)  # noqa: TRY400

    def sync(self) -> None:
        """Wait until the disk has all that was appended."""
        with self._lock:
            if self._descriptor is None:
                return
            descriptor = os.dup(self._descriptor)  # closing must not wait for a slow disk
        try:
            os.fsync(descriptor)
        except OSError as exc:
            log.warning("the disk does not confirm what waits for MLflow: %s", exc.strerror)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Let go of the file; it is removed when all was acknowledged."""
        with self._lock:
            self._closed = True
            if self._unkept or self.lost:
                log.error("entries lost that MLflow never received: %d", len(self._unkept) + self.lost)
            if self._descriptor is None:
                return
            try:
                if self._size() <= self._delivered:
                    self.path.unlink(missing_ok=True)
            except OSError as exc:
                log.warning("%s, which was delivered, cannot be removed: %s", self.path, exc.strerror)
            os.close(self._descriptor)
            self._descriptor = None

    def _opened(self) -> int:
        if self._descriptor is None:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._descriptor = _hold(self.path)
            data = self._read(0)
            if len(data) < self._size():
                log.warning("%s ends in half a line, which a power failure left; it is cut off", self.path)
                self._cut(len(data))
        return self._descriptor

    def _keep(self) -> None:
        """Write what is in memory, as far as the disk takes it."""
        while self._unkept and not self._closed:
            lines = list(itertools.islice(self._unkept, _BATCH))
            try:
                self._write_whole(b"".join(lines))
            except OSError as exc:
                if not self._failing:
                    reason = exc.strerror or type(exc).__name__
                    log.warning("%s cannot be written (%s); what waits for MLflow stays in memory", self.path, reason)
                self._failing = True
                return
            for _ in lines:
                self._unkept.popleft()
            if self._failing:
                log.warning("%s can be written again; entries lost meanwhile: %d", self.path, self.lost)
            self._failing = False

    def _write_whole(self, data: bytes) -> None:
        """Append all of it or nothing; raises OSError."""
        descriptor = self._opened()
        size = self._size()
        try:
            while data:
                data = data[self._write(descriptor, data) :]
        except OSError:
            self._cut(size)
            raise

    def _size(self) -> int:
        return 0 if self._descriptor is None else os.fstat(self._descriptor).st_size

    def _read(self, start: int) -> bytes:
        """Whole lines from `start` on; little, since an epoch is half a kilobyte."""
        if self._descriptor is None:
            return b""
        data = os.pread(self._descriptor, self._size() - start, start)
        return data[: data.rfind(b"\n") + 1]

    def _cut(self, size: int) -> None:
        if self._descriptor is None:
            return
        try:
            os.ftruncate(self._descriptor, size)
        except OSError as exc:
            log.warning("%s cannot be cut: %s", self.path, exc.strerror)
            return
        self._delivered = min(self._delivered, size)


def _hold(path: Path) -> int:
    """A descriptor of the file that holds its lock. Raises BlockingIOError where another one does."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _lies_at(path, descriptor):
                return descriptor
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # whoever had it before has delivered and removed it


def _lies_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _parsed(lines: list[bytes], path: Path) -> list[Entry]:
    entries = []
    for line in lines:
        try:
            entries.append(Entry.model_validate_json(line))
        except ValidationError:
            log.error("a line of %s cannot be read and is left out: %.200r", path, line)  # noqa: TRY400
    return entries
