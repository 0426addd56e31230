import hashlib
from dataclasses import replace

import numpy as np
import pytest
from medloop.data.build import build_dataset
from medloop.data.manifest import Manifest, Row, Split
from medloop.data.sources import phantom_source
from medloop.errors import InvalidDataset
from medloop.storage.objects import ObjectStore
from medloop.vision.encode import encode_png
from medloop_trainer.dataset import clean_rows, hashes, look_at, normalisation
from medloop_trainer.prepared import Prepared
from medloop_trainer.recipe import Options

JUDGING: tuple[Split, ...] = ("val", "calibration", "test")
LEARNING: tuple[Split, ...] = ("train", "val", "calibration")


def row(name: str, label: str, split: Split) -> Row:
    digest = hashlib.sha256(name.encode()).hexdigest()
    return Row(digest, digest, label, split, location=f"images/{digest}")


def manifest(*rows: Row) -> Manifest:
    return Manifest("set", ("a", "b"), rows)


def test_copies_of_judged_images_are_not_learnt_from() -> None:
    copy = replace(row("twin", "a", "train"), byte_hash="0" * 64)  # other bytes, the same pixels
    found = manifest(row("1", "a", "train"), row("2", "b", "train"), copy, row("twin", "a", "val"))
    clean = clean_rows(found)
    assert clean.left_out == 1
    assert {found.rows[i].byte_hash for i in clean.train} == {
        row("1", "a", "train").byte_hash,
        row("2", "b", "train").byte_hash,
    }


def test_no_split_judges_itself() -> None:
    """A test image's copies choose no epoch and set no threshold; the test split keeps all its images."""
    digests = iter(f"{number:064x}" for number in range(9))
    twins = [replace(row("twin", "a", split), byte_hash=next(digests)) for split in JUDGING]
    others = [row(f"{split} {label}", label, split) for split in LEARNING for label in "ab"]
    found = manifest(*twins, *others)
    clean = clean_rows(found)
    assert clean.left_out == 2
    assert len(found.of("test")) == 1
    for split, rows in (("val", clean.val), ("calibration", clean.calibration)):
        assert {found.rows[i].pixel_hash for i in rows} == {row(f"{split} {k}", k, "val").pixel_hash for k in "ab"}


def test_a_class_that_only_copies_would_teach_is_named() -> None:
    copy = replace(row("twin", "b", "train"), byte_hash="0" * 64)
    with pytest.raises(InvalidDataset, match="no training image of b "):
        clean_rows(manifest(row("1", "a", "train"), copy, row("twin", "b", "test"), row("3", "a", "val")))


def test_one_class_alone_is_nothing_to_learn() -> None:
    with pytest.raises(InvalidDataset, match="one class, a; add images of another"):
        clean_rows(Manifest("set", ("a",), (row("1", "a", "train"), row("2", "a", "val"))))


def test_without_validation_images_nothing_is_trained() -> None:
    with pytest.raises(InvalidDataset, match="no validation image"):
        clean_rows(manifest(row("1", "a", "train"), row("2", "b", "train"), row("3", "a", "test")))


def test_grey_images_are_prepared_grey_at_their_own_size(objects: ObjectStore) -> None:
    built = build_dataset(phantom_source(per_class=6, size=40, seed=0), objects)
    spec = look_at(built.manifest, objects).spec(Options())
    assert (spec.mode, spec.size) == ("L", 40)


@pytest.mark.parametrize(("tint", "mode"), [(0, "L"), (9, "RGB")])
def test_three_channels_are_colour_only_where_they_differ(objects: ObjectStore, tint: int, mode: str) -> None:
    pixels = np.full((30, 90, 3), 100, np.uint8)
    pixels[..., 0] += np.uint8(tint)
    one = row("1", "a", "train")
    objects.put(one.location, encode_png(pixels))
    spec = look_at(manifest(one), objects).spec(Options())
    assert (spec.mode, spec.size) == (mode, 64)


def test_normalisation_is_of_the_training_pixels_alone() -> None:
    images = np.zeros((4, 8, 8, 3), np.uint8)
    images[1, ..., 0] = 255
    images[3] = 200
    mean, std = normalisation(Prepared(images, np.zeros(4, np.int64), np.zeros(4, np.int32)), np.array([0, 1]))
    assert mean == pytest.approx([0.5, 0, 0])
    assert std == pytest.approx([0.5, 0.01, 0.01])  # blank channels divide by something


def test_hashes_are_the_manifests() -> None:
    found = manifest(row("1", "a", "train"), row("2", "b", "train"))
    assert [bytes(h).hex() for h in hashes(found, np.array([1, 0]))] == [r.byte_hash for r in reversed(found.rows)]
