"""Where there is no room for a cache, images are streamed, and training comes to the same weights."""

import copy
import logging
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from medloop.data.build import build_dataset
from medloop.data.cache import label_numbers, open_cache, rows_by_split
from medloop.data.manifest import Manifest
from medloop.data.shards import Layout, Shards
from medloop.data.sources import phantom_source
from medloop.errors import Preempted, StorageFull, StorageUnavailable
from medloop.storage.objects import ObjectStore
from medloop.testing import nearly_full
from medloop.vision.prepare import PreparationSpec
from medloop_trainer.budget import measure
from medloop_trainer.checkpoint import Checkpoints, find_checkpoint
from medloop_trainer.device import Device
from medloop_trainer.images import Images
from medloop_trainer.loop import fit
from medloop_trainer.prepared import Prepared, open_prepared
from medloop_trainer.recipe import Recipe
from medloop_trainer.sampler import WINDOW
from medloop_trainer.saver import Saver
from medloop_trainer.settings import PixelSettings
from medloop_trainer.stop import Stop

from .stores import MemoryObjects
from .tiny import SIZE, equal, tiny_about, tiny_network, tiny_recipe

SPEC = PreparationSpec(mode="L", size=SIZE)
IMAGE = SIZE * SIZE  # bytes
ANY = PixelSettings(cache_bytes=None)
NO_CACHE = PixelSettings(cache_bytes=0)


class Storage(MemoryObjects):
    """Shards go away, or are slow to come; all else stays."""

    def __init__(self) -> None:
        super().__init__()
        self.lost = False
        self.delay = threading.Event()
        self.delay.set()

    def get(self, key: str, *, at_most: int | None = None) -> bytes:
        if key.startswith("decoded/"):
            self.delay.wait(timeout=60)
            if self.lost:
                raise StorageUnavailable("The store is away.")
        return super().get(key)


@dataclass(frozen=True)
class Twice:
    """The same images in memory and in shards."""

    objects: Storage
    cached: Images
    streamed: Images


@pytest.fixture(scope="module")
def stored() -> tuple[Storage, Manifest]:
    objects = Storage()
    return objects, build_dataset(phantom_source(12, size=SIZE), objects).manifest


@pytest.fixture
def twice(stored: tuple[Storage, Manifest]) -> Twice:
    objects = copy.copy(stored[0])
    objects.content, objects.delay = dict(objects.content), threading.Event()
    objects.delay.set()
    manifest, indices = stored[1], rows_by_split(stored[1])
    layout = Layout.of(indices, IMAGE, IMAGE)  # an image a shard: more than two windows
    shards = Shards(manifest, SPEC, objects, layout, 2 * WINDOW * IMAGE, patience=0, pause=0.01)
    shards.make()
    labels = label_numbers(manifest) % 2
    streamed = Images(shards, labels, indices["train"], indices["val"], layout.shard)
    pixels = np.zeros(shards.shape, np.uint8)
    kept = layout.order
    pixels[kept] = shards[kept]
    return Twice(objects, replace(streamed, pixels=pixels), streamed)


def recipe_for(images: Images, epochs: int = 3) -> Recipe:
    steps = len(images.train) // 10
    assert len(images.train) > 2 * WINDOW
    return tiny_recipe(epochs=epochs).model_copy(update={"steps_per_epoch": steps})


def test_streamed_training_ends_with_the_same_weights(twice: Twice, device: Device) -> None:
    recipe, (one, other) = recipe_for(twice.cached), (tiny_network(), tiny_network())
    expected = fit(one, twice.cached, recipe, device)
    found = fit(other, twice.streamed, recipe, device)
    assert equal(one, other)
    assert [epoch.val for epoch in found.epochs] == [epoch.val for epoch in expected.epochs]


def test_objects_that_stay_away_cost_what_came_after_the_last_checkpoint(twice: Twice, device: Device) -> None:
    """Begun from shards until they are away, and gone on with, where there is room for it, from a cache."""
    recipe, whole, network = recipe_for(twice.cached), tiny_network(), tiny_network()
    fit(whole, twice.cached, recipe, device, checkpoint_steps=3)

    def progress(_: str, shown: int, __: int) -> None:
        twice.objects.lost = shown >= 50

    checkpoints = Checkpoints(twice.objects, tiny_about(recipe))
    with Saver(checkpoints, pause=0) as saver, pytest.raises(StorageUnavailable, match=f"--resume {'a' * 32}"):
        fit(tiny_network(), twice.streamed, recipe, device, saver=saver, checkpoint_steps=3, progress=progress)
    found = find_checkpoint(twice.objects, "a" * 32)
    assert 3 <= found.last.state.step < recipe.steps
    fit(network, twice.cached, recipe, device, start=(found.last, found.mark), checkpoint_steps=3)
    assert equal(network, whole)


def test_a_training_that_waits_for_images_can_be_stopped(twice: Twice, device: Device) -> None:
    recipe, stop = recipe_for(twice.cached), Stop()
    images = replace(twice.streamed, pixels=copy.copy(twice.streamed.pixels))
    twice.objects.delay.clear()
    stop.requested = True
    with Saver(Checkpoints(twice.objects, tiny_about(recipe)), pause=0) as saver, pytest.raises(Preempted):
        fit(tiny_network(), images, recipe, device, saver=saver, stop=stop)
    twice.objects.delay.set()
    assert find_checkpoint(twice.objects, "a" * 32).last.state.step == 0


def test_waiting_for_images_is_told(twice: Twice, device: Device) -> None:
    waited = 0.3  # seconds
    twice.objects.delay.clear()
    threading.Timer(waited, twice.objects.delay.set).start()
    recipe = recipe_for(twice.streamed, epochs=1)
    [epoch] = fit(tiny_network(), twice.streamed, recipe, device).epochs
    seconds = len(twice.streamed.train) / epoch.images_per_second
    assert waited * 0.9 <= epoch.input_wait_share * seconds <= seconds


def test_a_budget_is_measured_on_what_is_streamed(twice: Twice, device: Device) -> None:
    pace = measure(tiny_network(), twice.streamed, recipe_for(twice.streamed), device, compiled=False)
    assert min(pace.step, pace.validation) > 0


def opened(
    stored: tuple[Storage, Manifest], folder: Path, settings: PixelSettings = ANY, free: int = 10**12
) -> Prepared:
    return open_prepared(stored[1], SPEC, stored[0], folder, settings, free=lambda _: free)


def same(one: Prepared, other: Prepared, manifest: Manifest) -> bool:
    rows = np.array([i for i, row in enumerate(manifest.rows) if row.split != "test"])
    equal_labels = np.array_equal(one.labels, other.labels) and np.array_equal(one.shards, other.shards)
    return equal_labels and np.array_equal(one.images[rows], other.images[rows])


def test_a_cache_is_kept_where_there_is_room(stored: tuple[Storage, Manifest], tmp_path: Path) -> None:
    size = len(stored[1].rows) * IMAGE
    for number, (settings, free) in enumerate(
        [(NO_CACHE, 10**12), (ANY, size), (PixelSettings(cache_bytes=size - 1), 10**12)]
    ):
        assert isinstance(opened(stored, tmp_path / str(number), settings, free).images, Shards)
        assert not (tmp_path / str(number)).exists()
    for settings in (ANY, PixelSettings(cache_bytes=size)):
        assert isinstance(opened(stored, tmp_path / "cache", settings).images, np.ndarray)
    # What is there takes no room.
    there = opened(stored, tmp_path / "cache", NO_CACHE, free=0)
    assert isinstance(there.images, np.ndarray)
    assert same(there, opened(stored, tmp_path / "none", NO_CACHE), stored[1])


def test_a_disk_that_fills_up_meanwhile_leaves_streaming(
    stored: tuple[Storage, Manifest], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), nearly_full(16_384):
        found = opened(stored, tmp_path / "cache").images
    assert isinstance(found, Shards)
    assert "decoded images are streamed: The disk is full" in caplog.text
    assert not list((tmp_path / "cache").iterdir())


def test_without_room_for_cache_or_shards_it_says_what_to_do(objects: ObjectStore, tmp_path: Path) -> None:
    manifest = build_dataset(phantom_source(4, size=SIZE), objects).manifest
    assert objects.url.startswith("file:")
    with pytest.raises(StorageFull, match=r"MEDLOOP_HOME, choose a smaller --size, or keep objects in S3"):
        open_prepared(manifest, SPEC, objects, tmp_path / "cache", ANY, free=lambda _: 1000)
    assert not list(objects.list("decoded/"))
    # Shards that are there already need no room.
    open_prepared(manifest, SPEC, objects, tmp_path / "cache", NO_CACHE)
    streamed = open_prepared(manifest, SPEC, objects, tmp_path / "cache", ANY, free=lambda _: 0)
    assert isinstance(streamed.images, Shards)
    cache = open_cache(manifest, SPEC, objects, tmp_path / "other")
    rows = cache.indices("calibration")
    np.testing.assert_array_equal(streamed.images[rows], cache.images[rows])
