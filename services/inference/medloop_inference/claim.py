"""A folder for each process: held by a lock that the kernel lets go of when the process ends, however it does."""

import errno
import fcntl
import os
from pathlib import Path

_PROCESSES = 1000
"""That may share one root."""


def claim_folder(root: Path) -> tuple[Path, int]:
    """The first of the folders `0`, `1`, … below `root` that no living process holds, made if need be, and the
    descriptor that holds it from now on. Raises OSError."""
    for number in range(_PROCESSES):
        folder = root / str(number)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        held = hold(folder)
        if held is not None:
            return folder, held
    raise OSError(errno.EUSERS, os.strerror(errno.EUSERS), str(root))


def hold(folder: Path) -> int | None:
    """The descriptor that holds the folder's lock until it is closed; None where another process has it."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        os.close(descriptor)
        if isinstance(exc, BlockingIOError):
            return None
        raise
    return descriptor
