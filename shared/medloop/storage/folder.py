"""Objects in a folder of this machine.

An object is written beside the others (`.incoming/`), flushed, and moved into place in one step. Files are for their
owner only (0600, folders 0700), since they hold people's images.
"""

import errno
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from medloop.errors import InvalidRequest, NotFound, StorageFull, StorageUnavailable
from medloop.storage.objects import check_readable, check_size, check_writable

_INCOMING = ".incoming"  # no key can start with a dot
_ABANDONED_S = 3600.0  # a file this old in `.incoming/` belongs to a process that was killed


class FolderObjects:
    """`ObjectStore` in `root`, which is made when it is first written to.

    `write` is `os.write` or, in tests, something that fails like a full disk.
    """

    def __init__(self, root: Path, *, write: Callable[[int, memoryview], int] = os.write) -> None:
        self._root = root.absolute()
        self._write = write
        self._prepared = False
        self._unflushed = False
        self._flushing = threading.Lock()

    def __repr__(self) -> str:
        return f"FolderObjects({self.url!r})"

    @property
    def url(self) -> str:
        return self._root.as_uri()

    def put(self, key: str, data: bytes, *, durable: bool = True) -> None:
        target = self._target(key)
        with self._translated(key), self._incoming(data, durable) as incoming:
            _make_folders(target.parent)
            incoming.replace(target)
            self._settle(target, durable)

    def put_if_absent(self, key: str, data: bytes, *, durable: bool = True) -> bool:
        target = self._target(key)
        with self._translated(key):
            if not target.is_file():
                with self._incoming(data, durable) as incoming:
                    _make_folders(target.parent)
                    if _link(incoming, target):
                        self._settle(target, durable)
                        return True
            if durable:  # whoever stored it may not have waited for the disk
                _flush(target)
                self._settle(target, durable)
            return False

    def get(self, key: str, *, at_most: int | None = None) -> bytes:
        check_readable(key)
        with self._translated(key):
            try:
                with (self._root / key).open("rb") as file:
                    check_size(key, os.fstat(file.fileno()).st_size, at_most)
                    return file.read()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as exc:
                raise NotFound(f"There is no object {key} in {self.url}.") from exc

    def exists(self, key: str) -> bool:
        check_readable(key)
        with self._translated(key):
            return (self._root / key).is_file()

    def list(self, prefix: str = "") -> Iterator[str]:
        check_readable(prefix + "x")  # a prefix is right if a key can start with it
        folder, _, start = prefix.rpartition("/")
        return self._walk(folder, start)

    def delete(self, key: str) -> None:
        check_readable(key)
        with self._translated(key):
            try:
                (self._root / key).unlink(missing_ok=True)
                _flush((self._root / key).parent)
            except (FileNotFoundError, NotADirectoryError):
                return  # the folder it would lie in is not there either

    def ping(self) -> None:
        with self._translated(""), self._incoming(b"ping", durable=False):
            pass

    def _target(self, key: str) -> Path:
        check_writable(key)
        return self._root / key

    def _walk(self, folder: str, start: str) -> Iterator[str]:
        """Keys below `folder` whose next segment starts with `start`, in the order of whole keys: a folder sorts
        as its name with the slash that follows it."""
        with self._translated(folder):
            try:
                with os.scandir(self._root / folder) as entries:
                    names = sorted(entry.name + "/" * entry.is_dir() for entry in entries)
            except (FileNotFoundError, NotADirectoryError):
                return
        for name in names:
            if name.startswith(".") or not name.startswith(start):
                continue
            key = f"{folder}/{name}" if folder else name
            if name.endswith("/"):
                yield from self._walk(key.rstrip("/"), "")
            else:
                yield key

    @contextmanager
    def _incoming(self, data: bytes, durable: bool) -> Iterator[Path]:
        """A file holding `data`, gone afterwards unless it was moved to its place."""
        self._prepare()
        descriptor, name = tempfile.mkstemp(dir=self._root / _INCOMING)  # made 0600
        try:
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[self._write(descriptor, rest) :]
                if durable:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)

    def _settle(self, target: Path, durable: bool) -> None:
        """Make the name of `target` last, and all that was written before it; or remember that this is to do."""
        if not durable:
            self._unflushed = True
            return
        with self._flushing:
            if self._unflushed:
                self._unflushed = False
                os.sync()
        folder = target.parent
        while folder != self._root:
            _flush(folder)
            folder = folder.parent
        _flush(self._root)

    def _prepare(self) -> None:
        """Make the root once, and remove what killed processes left behind: it may be an image that was erased."""
        incoming = self._root / _INCOMING
        if self._prepared and incoming.is_dir():
            return
        try:
            new = not self._root.exists()
            _make_folders(incoming)
            if new:
                os.sync()  # the folders above may be new as well
            for path in incoming.iterdir():
                if path.stat().st_mtime < time.time() - _ABANDONED_S:
                    path.unlink()
        except FileNotFoundError:
            pass  # another process moved or swept the file between our two looks
        except (NotADirectoryError, FileExistsError) as exc:
            raise StorageUnavailable(f"{self.url} is not a folder; move the file away or name another place.") from exc
        self._prepared = True

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except (NotADirectoryError, IsADirectoryError, FileExistsError) as exc:
            raise InvalidRequest(f"The object key {key} is, or lies under, another object's key; rename it.") from exc
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFull(f"The disk under {self.url} is full; free some space and try again.") from exc
            reason = exc.strerror or type(exc).__name__
            raise StorageUnavailable(f"The folder {self.url} cannot be used: {reason}; check it.") from exc


def _make_folders(folder: Path) -> None:
    """Make `folder` and those above it, for their owner only (`mkdir(parents=True)` would open the upper ones)."""
    if folder.is_dir():
        return
    _make_folders(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)


def _link(source: Path, target: Path) -> bool:
    """Give the file its name unless that is taken: the one call that file systems decide for exactly one caller."""
    try:
        target.hardlink_to(source)
    except FileExistsError:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target)) from None
        return False
    return True


def _flush(path: Path) -> None:
    """Wait until the disk has the file, or the names in the folder, at `path`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
