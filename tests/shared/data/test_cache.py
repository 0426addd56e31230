"""The decoded cache: the same pixels as preparing each image, made once, and never trusted when damaged."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from medloop.data.build import build_dataset
from medloop.data.cache import Cache, open_cache
from medloop.data.manifest import SPLITS, Manifest
from medloop.data.sources import phantom_source
from medloop.errors import InvalidImage, NotFound, StorageFull, StorageUnavailable
from medloop.storage.objects import ObjectStore
from medloop.testing import nearly_full
from medloop.vision.prepare import PreparationSpec, prepare

SPEC = PreparationSpec(mode="L", size=24)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def manifest(objects: ObjectStore) -> Manifest:
    return build_dataset(phantom_source(30, size=32), objects).manifest


class NoObjects:
    """A store that must not be asked."""

    url = "file:///nowhere"

    def get(self, key: str) -> bytes:
        raise AssertionError(f"{key} was read, although it is cached")


def only(folder: Path) -> Path:
    (place,) = folder.iterdir()
    return place


@pytest.mark.parametrize("spec", [SPEC, PreparationSpec(mode="RGB", size=16, fit="crop")])
def test_it_holds_what_preparation_gives(
    manifest: Manifest, objects: ObjectStore, folder: Path, spec: PreparationSpec
) -> None:
    cache = open_cache(manifest, spec, objects, folder)
    assert cache.images.shape == (180, spec.size, spec.size, spec.channels)
    assert (cache.images.dtype.name, cache.labels.dtype.name) == ("uint8", "int64")
    for i, row in enumerate(manifest.rows):
        np.testing.assert_array_equal(cache.images[i], prepare(objects.get(row.location), spec))
        assert manifest.classes[cache.labels[i]] == row.label
    assert not cache.images.flags.writeable


def test_splits_are_row_numbers(manifest: Manifest, objects: ObjectStore, folder: Path) -> None:
    cache = open_cache(manifest, SPEC, objects, folder)
    for split in SPLITS:
        assert tuple(manifest.rows[i] for i in cache.indices(split)) == manifest.of(split)
    every = np.concatenate([cache.indices(split) for split in SPLITS])
    assert sorted(every.tolist()) == list(range(180))
    assert every.dtype == np.int64


def test_the_second_time_no_image_is_read(manifest: Manifest, objects: ObjectStore, folder: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    first = open_cache(manifest, SPEC, objects, folder, progress=lambda *step: seen.append(step))
    assert seen[-1] == ("decoding images", 180, 180)
    nothing: ObjectStore = NoObjects()  # type: ignore[assignment]
    again = open_cache(replace(manifest, name="other"), SPEC, nothing, folder)
    np.testing.assert_array_equal(again.images, first.images)


def test_other_specs_and_versions_have_their_own(manifest: Manifest, objects: ObjectStore, folder: Path) -> None:
    open_cache(manifest, SPEC, objects, folder)
    open_cache(manifest, PreparationSpec(mode="L", size=24, fit="crop"), objects, folder)
    open_cache(replace(manifest, rows=manifest.rows[1:]), SPEC, objects, folder)
    assert len(list(folder.glob("*-*"))) == 3


def cut(place: Path) -> None:
    with (place / "images.u8").open("r+b") as file:
        file.truncate(1000)


def flip(place: Path) -> None:
    with (place / "images.u8").open("r+b") as file:
        file.write(b"\x01\x02\x03")


def lie(place: Path) -> None:
    meta = json.loads((place / "meta.json").read_text())
    (place / "meta.json").write_text(json.dumps(meta | {"spec": "0" * 64}))


def scribble(place: Path) -> None:
    (place / "meta.json").write_text("{")


def empty(place: Path) -> None:
    (place / "meta.json").write_text("[]")


def lose(place: Path) -> None:
    (place / "images.u8").unlink()


@pytest.mark.parametrize("damage", [cut, flip, lie, scribble, empty, lose])
def test_a_damaged_cache_is_made_anew(
    manifest: Manifest,
    objects: ObjectStore,
    folder: Path,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = np.array(open_cache(manifest, SPEC, objects, folder).images)
    damage(only(folder))
    with caplog.at_level(logging.WARNING):
        cache = open_cache(manifest, SPEC, objects, folder)
    assert "made anew" in caplog.text
    np.testing.assert_array_equal(cache.images, expected)
    assert len(list(folder.iterdir())) == 1


def test_a_full_disk_is_told_and_leaves_nothing(manifest: Manifest, objects: ObjectStore, folder: Path) -> None:
    with nearly_full(65_536), pytest.raises(StorageFull, match="free some space"):
        open_cache(manifest, SPEC, objects, folder)
    assert not list((folder).iterdir())


def test_a_folder_that_cannot_be_is_told(manifest: Manifest, objects: ObjectStore, folder: Path) -> None:
    folder.touch()
    with pytest.raises(StorageUnavailable, match="cannot be kept"):
        open_cache(manifest, SPEC, objects, folder / "file")


def test_an_image_that_is_gone_or_damaged_leaves_nothing(
    manifest: Manifest, objects: ObjectStore, folder: Path
) -> None:
    location = manifest.rows[70].location
    objects.put(location, objects.get(location)[:100])
    with pytest.raises(InvalidImage, match=f"{location} is damaged"):
        open_cache(manifest, SPEC, objects, folder)
    objects.delete(location)
    with pytest.raises(NotFound):
        open_cache(manifest, SPEC, objects, folder)
    assert not list((folder).iterdir())


def test_many_blocks_have_a_checksum_each(manifest: Manifest, objects: ObjectStore, folder: Path) -> None:
    spec = PreparationSpec(mode="RGB", size=96)
    open_cache(manifest, spec, objects, folder)
    size = 180 * 96 * 96 * 3
    assert len(json.loads((only(folder) / "meta.json").read_text())["crc32"]) == -(-size // 2**20)
    with (only(folder) / "images.u8").open("r+b") as file:
        file.seek(size - 1)
        last = file.read(1)
        file.seek(size - 1)
        file.write(bytes([last[0] ^ 1]))
    cache: Cache = open_cache(manifest, spec, objects, folder)
    assert cache.images[-1, -1, -1, -1] == last[0]
