"""This machine's disk: its errors, translated at one edge."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medloop.errors import StorageFull, StorageUnavailable


def free_bytes(path: Path) -> int:
    """What this process may still write on the disk that `path` lies on, or would lie on."""
    path = path.absolute()
    with disk_errors(path):
        return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError met while reading or writing below `path` into StorageFull or StorageUnavailable."""
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(f"The disk under {path} is full; free some space.") from exc
        raise StorageUnavailable(f"{path} cannot be read or written: {exc.strerror or exc}.") from exc
