"""Shards in objects: the same pixels as preparing each image, whatever becomes of the store, in bounded memory."""

import logging
import threading
from collections.abc import Callable, Iterator
from weakref import WeakSet

import numpy as np
import pytest
from medloop.data.build import build_dataset
from medloop.data.cache import rows_by_split
from medloop.data.manifest import Manifest
from medloop.data.shards import Layout, Rows, Shards
from medloop.data.sources import phantom_source
from medloop.errors import InvalidImage, NotFound, Preempted, StorageFull, StorageUnavailable
from medloop.vision.prepare import PreparationSpec, prepare
from numpy.typing import NDArray

SPEC = PreparationSpec(mode="L", size=24)
IMAGE = 24 * 24  # bytes
HELD = 12  # shards


class Tracked(bytearray):
    """Bytes that can be counted as long as somebody holds them."""

    def __hash__(self) -> int:  # type: ignore[override]  # by itself it has none
        return id(self)


class Store:
    """Objects in memory that can go away, and that know how many shards somebody holds."""

    url = "memory:"

    def __init__(self, content: dict[str, bytes]) -> None:
        self.content = content
        self.away = 0
        self.full = False
        self.reads = threading.Semaphore(0)
        self.held: WeakSet[Tracked] = WeakSet()
        self.most = 0
        self._counting = threading.Lock()

    def get(self, key: str, *, at_most: int | None = None) -> bytes:
        if key not in self.content:
            raise NotFound(f"There is no object {key}.")
        if not key.startswith("decoded/"):
            return self.content[key]
        with self._counting:
            if self.away:
                self.away -= 1
                raise StorageUnavailable("The store is away.")
            counted = Tracked(self.content[key])
            self.held.add(counted)
            self.most = max(self.most, len(self.held))
        self.reads.release()
        return counted  # type: ignore[return-value]  # bytes, but for what we do not do with them

    def put(self, key: str, data: bytes, *, durable: bool = True) -> None:
        if self.full:
            raise StorageFull("The store is full.")
        self.content[key] = bytes(data)

    def put_if_absent(self, key: str, data: bytes, *, durable: bool = True) -> bool:
        return self.content.setdefault(key, data) is data

    def exists(self, key: str) -> bool:
        return key in self.content

    def list(self, prefix: str = "") -> Iterator[str]:
        return iter(sorted(key for key in self.content if key.startswith(prefix)))

    def delete(self, key: str) -> None:
        self.content.pop(key, None)

    def ping(self) -> None:
        """It answers."""


@pytest.fixture(scope="module")
def dataset() -> tuple[Store, Manifest]:
    objects = Store({})
    return objects, build_dataset(phantom_source(30, size=32), objects).manifest


@pytest.fixture
def store(dataset: tuple[Store, Manifest]) -> Store:
    return Store(dict(dataset[0].content))


@pytest.fixture
def manifest(dataset: tuple[Store, Manifest]) -> Manifest:
    return dataset[1]


def shards_of(manifest: Manifest, store: Store, *, images: int = 5, patience: float = 0.0) -> Shards:
    layout = Layout.of(rows_by_split(manifest), IMAGE, images * IMAGE)
    return Shards(manifest, SPEC, store, layout, HELD * images * IMAGE, patience=patience, pause=0.01)


@pytest.fixture
def shards(manifest: Manifest, store: Store) -> Shards:
    found = shards_of(manifest, store)
    found.make()
    return found


@pytest.fixture
def truth(manifest: Manifest, store: Store) -> NDArray[np.uint8]:
    return np.stack([prepare(store.get(row.location), SPEC) for row in manifest.rows])


def learnt(shards: Shards) -> Rows:
    """All rows that lie in shards, in their order there."""
    return shards.layout.order


def test_it_holds_what_preparation_gives(manifest: Manifest, shards: Shards, truth: NDArray[np.uint8]) -> None:
    rows = np.random.default_rng(0).permutation(learnt(shards))
    assert sorted(rows.tolist()) == [i for i, row in enumerate(manifest.rows) if row.split != "test"]
    np.testing.assert_array_equal(shards[rows], truth[rows])
    np.testing.assert_array_equal(shards[rows[:0]], truth[:0])
    for batch, pixels in shards.stream(np.array_split(rows, 9)):
        np.testing.assert_array_equal(pixels, truth[batch])


def test_test_images_are_not_to_be_had(manifest: Manifest, shards: Shards) -> None:
    of_test = [i for i, row in enumerate(manifest.rows) if row.split == "test"]
    with pytest.raises(IndexError, match="test split"):
        shards[np.array([0, of_test[0]])]
    with pytest.raises(IndexError, match="test split"):
        shards[:]


def test_a_shard_is_of_one_split_and_no_larger_than_it_may_be(manifest: Manifest, shards: Shards) -> None:
    layout = shards.layout
    for number, name in enumerate(layout.names):
        rows = layout.rows(number)
        assert 1 <= len(rows) <= 5
        assert {manifest.rows[i].split for i in rows} == {name.rpartition("-")[0]}
        assert (layout.shard[rows] == number).all()
        assert layout.place[rows].tolist() == list(range(len(rows)))


def test_whoever_comes_first_stores_them(manifest: Manifest, shards: Shards, store: Store) -> None:
    assert shards.missing_bytes() == 0
    lost = next(store.list("decoded/"))
    kept = store.get(lost)
    store.delete(lost)
    seen: list[tuple[str, int, int]] = []
    other = shards_of(manifest, store)
    assert other.missing_bytes() == len(kept) - 4
    other.make(lambda *step: seen.append(step))
    assert seen == [("decoding images", len(learnt(shards)), len(learnt(shards)))]
    assert store.get(lost) == kept


def test_memory_holds_what_it_may_and_what_comes_next_is_read_meanwhile(shards: Shards, store: Store) -> None:
    batches = [shards.layout.rows(number) for number in range(len(shards.layout.names))]
    assert len(batches) > 2 * HELD
    stream = shards.stream(batches)
    next(stream)
    for _ in range(HELD - 4):  # the rest is left to a stream beside it
        assert store.reads.acquire(timeout=30), "nobody reads ahead"
    beside = shards.stream(batches[::-1], aside=True)
    for _ in stream:
        next(beside, None)
    assert store.most <= HELD


def test_what_is_needed_again_soon_is_read_once(shards: Shards, store: Store) -> None:
    one, other = shards.layout.rows(0), shards.layout.rows(1)
    list(shards.stream([one, other, one, np.concatenate([one, other])]))
    assert sum(store.reads.acquire(blocking=False) for _ in range(9)) == 2


def cut(store: Store, key: str) -> None:
    store.put(key, store.get(key)[:-1])


def flip(store: Store, key: str) -> None:
    data = bytearray(store.get(key))
    data[7] ^= 1
    store.put(key, bytes(data))


def swap(store: Store, key: str) -> None:
    """Whole, but another shard's."""
    store.put(key, store.get(key.replace("00000", "00001")))


def lose(store: Store, key: str) -> None:
    store.delete(key)


def empty(store: Store, key: str) -> None:
    store.put(key, b"")


@pytest.mark.parametrize("damage", [cut, flip, swap, lose, empty])
def test_a_damaged_shard_is_made_anew(
    shards: Shards,
    store: Store,
    truth: NDArray[np.uint8],
    damage: Callable[[Store, str], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    key = next(key for key in store.list("decoded/") if key.endswith("train-00000.u8"))
    whole, rows = bytes(store.get(key)), shards.layout.rows(0)
    damage(store, key)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(shards[rows], truth[rows])
    assert caplog.text.count("made anew") == 1
    assert store.get(key) == whole

    damage(store, key)
    store.full = True
    np.testing.assert_array_equal(shards[rows], truth[rows])


def test_it_waits_for_objects_that_come_back(
    manifest: Manifest, shards: Shards, store: Store, truth: NDArray[np.uint8], caplog: pytest.LogCaptureFixture
) -> None:
    store.away = 3
    rows = shards.layout.rows(0)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(shards_of(manifest, store, patience=60)[rows], truth[rows])
    assert caplog.text.count("waiting for objects: The store is away.") == 1, "told once"
    store.away = 1
    with pytest.raises(StorageUnavailable, match="is away"):
        shards[rows]


def test_whoever_waits_can_be_told_to_stop(manifest: Manifest, shards: Shards, store: Store) -> None:
    store.away, before = 10**9, set(threading.enumerate())

    def stop() -> None:
        raise Preempted("stop")

    with pytest.raises(Preempted):
        list(shards_of(manifest, store, patience=600).stream([learnt(shards)[:1]], stop))
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_an_image_that_is_gone_or_another_one_is_told(manifest: Manifest, store: Store) -> None:
    shards = shards_of(manifest, store)
    one, other = (manifest.rows[i].location for i in learnt(shards)[[0, -1]])
    kept = store.get(one)
    store.put(one, store.get(other))
    with pytest.raises(InvalidImage, match=f"{one} is damaged"):
        shards.make()
    store.put(one, kept)
    store.delete(other)
    for key in store.list("decoded/"):
        store.delete(key)
    with pytest.raises(NotFound):
        shards.make()


def test_a_million_rows_cost_little_memory() -> None:
    splits = np.random.default_rng(0).integers(0, 10, 1_000_000)
    indices = {
        name: np.flatnonzero(mask)
        for name, mask in {
            "train": splits < 7,
            "val": splits == 7,
            "calibration": splits == 8,
            "test": splits == 9,
        }.items()
    }
    layout = Layout.of(indices, 28 * 28)  # type: ignore[arg-type]
    assert layout.shard.nbytes + layout.place.nbytes + layout.order.nbytes < 16 * 1_000_000
    assert len(layout.names) < 200
