"""Objects that somebody waits for answer in time, whatever the store does. That they are objects like others is told by
the contract suite."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from medloop.errors import StorageUnavailable
from medloop.storage.folder import FolderObjects
from medloop.storage.prompt import PromptObjects

SOON = 0.05


class Hanging(FolderObjects):
    """Objects that answer while `answering` is set; `asked` counts who came, `done` who has their answer."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.answering, self.asked, self.done = threading.Event(), threading.Semaphore(0), threading.Semaphore(0)

    def put(self, key: str, data: bytes, *, durable: bool = True) -> None:
        self.asked.release()
        assert self.answering.wait(60)
        super().put(key, data, durable=durable)
        self.done.release()


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[Hanging]:
    store = Hanging(tmp_path)
    yield store
    store.answering.set()


def test_whoever_waits_is_told_when_the_time_is_up_and_the_write_may_still_happen(hanging: Hanging) -> None:
    objects = PromptObjects(hanging, SOON)
    with pytest.raises(StorageUnavailable, match=r"does not answer within 0.05 s; try again") as caught:
        objects.put("key", b"late")
    assert hanging.url in str(caught.value)
    assert not hanging.exists("key")
    hanging.answering.set()
    assert hanging.done.acquire(timeout=60)
    assert hanging.get("key") == b"late"


def test_what_nobody_waits_for_any_more_is_bounded_too(hanging: Hanging) -> None:
    objects = PromptObjects(hanging, SOON, places=2)
    for _ in range(4):
        with pytest.raises(StorageUnavailable):
            objects.put("key", b"x")
    assert [hanging.asked.acquire(timeout=60), hanging.asked.acquire(timeout=60)] == [True, True]
    assert not hanging.asked.acquire(blocking=False)  # the last two found no place
    hanging.answering.set()
    assert hanging.done.acquire(timeout=60)
    assert hanging.done.acquire(timeout=60)
    PromptObjects(hanging, 60, places=1).put("key", b"y")


def test_a_list_that_hangs_halfway_is_told_too(tmp_path: Path) -> None:
    answering = threading.Event()

    class Lists(FolderObjects):
        def list(self, prefix: str = "") -> Iterator[str]:
            yield from (f"{prefix}{number:04d}" for number in range(1000))
            assert answering.wait(60)

    objects = PromptObjects(Lists(tmp_path), 60)
    keys = objects.list("a/")
    assert [next(keys) for _ in range(1000)][::999] == ["a/0000", "a/0999"]
    objects.seconds = SOON
    with pytest.raises(StorageUnavailable):
        next(keys)
    answering.set()


def test_a_thread_that_cannot_start_takes_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    objects = PromptObjects(FolderObjects(tmp_path), 60, places=1)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", full)
        with pytest.raises(StorageUnavailable, match="no more threads"):
            objects.put("key", b"x")
    objects.put("key", b"y")
    assert objects.get("key") == b"y"
