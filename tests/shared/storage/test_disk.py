"""What the disk says becomes what a person can act on."""

import errno
import os
from pathlib import Path

import pytest
from medloop.errors import MedLoopError, StorageFull, StorageUnavailable
from medloop.storage.disk import disk_errors


@pytest.mark.parametrize(
    ("number", "error"),
    [(errno.ENOSPC, StorageFull), (errno.EDQUOT, StorageFull), (errno.EROFS, StorageUnavailable)],
)
def test_an_os_error_is_translated_once(number: int, error: type[MedLoopError]) -> None:
    with pytest.raises(error, match="/some/place"), disk_errors(Path("/some/place")):
        raise OSError(number, os.strerror(number))
