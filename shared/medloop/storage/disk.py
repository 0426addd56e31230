"""This machine's disk: its errors, translated at one edge."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medloop.errors import StorageFull, StorageUnavailable


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError met while reading or writing below `path` into StorageFull or StorageUnavailable."""
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(f"The disk under {path} is full; free some space.") from exc
        raise StorageUnavailable(f"{path} cannot be read or written: {exc.strerror or exc}.") from exc
