"""What every object store promises."""

import os
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
from medloop.errors import InvalidRequest, NotFound, ObjectTooLarge
from medloop.storage.objects import ObjectStore


def test_gives_back_the_bytes_it_was_given(objects: ObjectStore) -> None:
    every_byte = bytes(range(256)) * 4096
    objects.put("images/ab/one.bin", every_byte)
    objects.put("empty", b"")
    assert objects.get("images/ab/one.bin") == every_byte
    assert objects.get("empty") == b""


def test_put_replaces(objects: ObjectStore) -> None:
    objects.put("key", b"a longer first value")
    objects.put("key", b"second")
    assert objects.get("key") == b"second"


@pytest.mark.parametrize("durable", [True, False])
def test_put_if_absent_keeps_what_is_there(objects: ObjectStore, durable: bool) -> None:
    assert objects.put_if_absent("images/key", b"first", durable=durable)
    assert not objects.put_if_absent("images/key", b"second", durable=durable)
    assert not objects.put_if_absent("images/key", b"third")
    assert objects.get("images/key") == b"first"


def test_of_many_writers_exactly_one_puts(objects: ObjectStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: objects.put_if_absent("claim", b"%d" % i), range(16)))
    assert sum(won) == 1
    assert objects.get("claim") == b"%d" % won.index(True)


def test_a_reader_never_sees_half_an_object(objects: ObjectStore) -> None:
    versions = [bytes([i]) * 1_000_000 for i in range(4)]
    objects.put("key", versions[0])
    written = Event()

    def read() -> int:
        reads = 0
        while not written.is_set():
            assert objects.get("key") in versions
            reads += 1
        return reads

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            for version in versions * 5:
                objects.put("key", version)
        finally:
            written.set()  # the readers end even if a write fails
        assert all(reader.result() > 0 for reader in readers)


def test_what_is_not_there(objects: ObjectStore) -> None:
    with pytest.raises(NotFound, match="absent"):
        objects.get("some/absent")
    assert not objects.exists("some/absent")
    objects.put("some/key", b"x")
    with pytest.raises(NotFound):
        objects.get("some")  # a folder is no object
    with pytest.raises(NotFound):
        objects.get("some/key/below")
    assert not objects.exists("some")
    assert objects.exists("some/key")


def test_no_more_is_read_than_is_asked_for(objects: ObjectStore) -> None:
    objects.put("a/b", b"1234")
    assert objects.get("a/b", at_most=4) == b"1234"
    with pytest.raises(ObjectTooLarge, match="a/b has 4 bytes, more than the 3"):
        objects.get("a/b", at_most=3)
    assert objects.get("a/b") == b"1234", "the connection is still good"


def test_delete_is_idempotent(objects: ObjectStore) -> None:
    objects.delete("never/there")
    objects.put("key", b"x")
    objects.delete("key")
    objects.delete("key")
    assert not objects.exists("key")
    assert objects.put_if_absent("key", b"again")


def test_lists_whole_keys_in_order(objects: ObjectStore) -> None:
    keys = ["b", "a/z", "a-b/c", "a.txt", "a/b/c", "images/ab/1", "images/abc", "images/a/9", "A"]
    assert list(objects.list()) == []
    for key in keys:
        objects.put(key, b"")
    assert list(objects.list()) == sorted(keys)
    for prefix in ("a", "a/", "a/b", "images/ab", "images/ab/", "none/at/all", "b/"):
        assert list(objects.list(prefix)) == sorted(key for key in keys if key.startswith(prefix)), prefix


def test_lists_more_than_one_page(objects: ObjectStore) -> None:
    keys = [f"page/{i:04d}" for i in range(1001)]  # S3 lists a thousand at a time
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: objects.put(key, b"", durable=False), keys))
    assert list(objects.list("page/")) == keys


@pytest.mark.parametrize(
    "key",
    ["", "/etc/passwd", "..", "../up", "a/../b", "a//b", "a/", "./a", "a\0b", "a\nb", "k" * 256, "k/" * 600 + "k"],
)
def test_refuses_keys_that_lead_elsewhere(objects: ObjectStore, key: str) -> None:
    for verb in (objects.get, objects.exists, objects.delete):
        with pytest.raises(InvalidRequest):
            verb(key)
    with pytest.raises(InvalidRequest):
        objects.put(key, b"")
    with pytest.raises(InvalidRequest):
        objects.put_if_absent(key, b"")
    with pytest.raises(InvalidRequest):
        objects.list(key + "/../")


@pytest.mark.parametrize("key", ["with space", "ümlaut", ".hidden", "a/.incoming", "-flag", "a\\b", "a?b"])
def test_writes_plain_names_only_but_reads_any(objects: ObjectStore, key: str) -> None:
    with pytest.raises(InvalidRequest, match="rename"):
        objects.put(key, b"")
    with pytest.raises(NotFound):
        objects.get(key)


def test_answers_a_ping_and_leaves_nothing(objects: ObjectStore) -> None:
    objects.ping()
    assert list(objects.list()) == []


def test_names_itself(objects: ObjectStore) -> None:
    assert objects.url.startswith(("file:///", "s3://"))
    assert objects.url in repr(objects)
    assert os.environ.get("AWS_SECRET_ACCESS_KEY", "secret") not in objects.url.split("/")
