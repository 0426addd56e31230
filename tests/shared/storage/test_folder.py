"""What only a folder promises: private files, full disks, nothing left behind."""

import errno
import os
import stat
from pathlib import Path

import pytest
from medloop.errors import InvalidRequest, NotFound, StorageFull, StorageUnavailable
from medloop.storage.folder import FolderObjects


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


class FullDisk:
    """Takes `room` bytes, then fails as a full disk does."""

    def __init__(self, room: int, code: int = errno.ENOSPC) -> None:
        self.room = room
        self.code = code

    def __call__(self, descriptor: int, data: memoryview) -> int:
        if self.room == 0:
            raise OSError(self.code, os.strerror(self.code))
        written = os.write(descriptor, data[: self.room])
        self.room -= written
        return written


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_and_keeps_the_old_object(tmp_path: Path, code: int) -> None:
    FolderObjects(tmp_path).put("key", b"old")
    full = FolderObjects(tmp_path, write=FullDisk(5, code))
    with pytest.raises(StorageFull, match="free some space"):
        full.put("key", b"longer than five bytes")
    with pytest.raises(StorageFull):
        full.put_if_absent("other", b"x")
    with pytest.raises(StorageFull):
        full.ping()
    assert full.get("key") == b"old"
    assert [path.name for path in _files(tmp_path)] == ["key"]


def test_another_failure_of_the_disk_is_told(tmp_path: Path) -> None:
    broken = FolderObjects(tmp_path, write=FullDisk(0, errno.EIO))
    with pytest.raises(StorageUnavailable, match="Input/output error"):
        broken.put("key", b"x")


def test_a_write_in_pieces_is_whole(tmp_path: Path) -> None:
    objects = FolderObjects(tmp_path, write=lambda descriptor, data: os.write(descriptor, data[:7]))
    objects.put("key", bytes(range(100)))
    assert objects.get("key") == bytes(range(100))


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    root = tmp_path / "new" / "objects"
    mask = os.umask(0)
    try:
        objects = FolderObjects(root)
        objects.put("a/b/put", b"x")
        objects.put_if_absent("a/c/once", b"x", durable=False)
    finally:
        os.umask(mask)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in _files(root)}
    folders = {stat.S_IMODE(path.stat().st_mode) for path in [root.parent, root, *root.rglob("*")] if path.is_dir()}
    assert (modes, folders) == ({0o600}, {0o700})


def test_no_key_is_the_folder_of_another(tmp_path: Path) -> None:
    objects = FolderObjects(tmp_path)
    objects.put("a/b", b"x")
    for put in (objects.put, objects.put_if_absent):
        with pytest.raises(InvalidRequest, match="another object's key"):
            put("a", b"y")
        with pytest.raises(InvalidRequest, match="another object's key"):
            put("a/b/c", b"y")
    assert list(objects.list()) == ["a/b"]


def test_opening_makes_nothing(tmp_path: Path) -> None:
    objects = FolderObjects(tmp_path / "later")
    assert list(objects.list()) == []
    with pytest.raises(NotFound):
        objects.get("key")
    objects.delete("key")
    assert not (tmp_path / "later").exists()


def test_a_file_in_the_place_of_the_root(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    for root in (tmp_path / "file", tmp_path / "file" / "objects"):
        with pytest.raises(StorageUnavailable, match="not a folder"):
            FolderObjects(root).put("key", b"x")
        with pytest.raises(StorageUnavailable):
            FolderObjects(root).ping()


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    incoming = tmp_path / ".incoming"
    incoming.mkdir()
    for name, age_s in (("old", 7200.0), ("fresh", 0.0)):
        (incoming / name).write_bytes(b"somebody's image")
        written = (incoming / name).stat().st_mtime - age_s
        os.utime(incoming / name, (written, written))
    objects = FolderObjects(tmp_path)
    objects.put("key", b"x")
    assert [path.name for path in incoming.iterdir()] == ["fresh"]
    assert list(objects.list()) == ["key"]


def test_goes_on_when_the_folder_was_removed(tmp_path: Path) -> None:
    objects = FolderObjects(tmp_path / "objects")
    objects.put("key", b"x")
    for path in (*_files(tmp_path), tmp_path / "objects" / ".incoming", tmp_path / "objects"):
        path.unlink() if path.is_file() else path.rmdir()
    objects.put("key", b"y")
    assert objects.get("key") == b"y"
