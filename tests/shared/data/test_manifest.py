"""A data set version is named by its content: these tests hold what must and must not change the name."""

import gzip
import hashlib
import json
from dataclasses import replace

import pytest
from medloop.data.manifest import SPLITS, Manifest, Row, dataset_key, iter_rows, latest_version, lineage, load_manifest
from medloop.errors import InvalidDataset, InvalidRequest, NotFound
from medloop.storage.objects import ObjectStore


def rows(count: int = 40) -> list[Row]:
    return [
        Row(
            byte_hash=hashlib.sha256(b"bytes %d" % i).hexdigest(),
            pixel_hash=hashlib.sha256(b"pixels %d" % i).hexdigest(),
            label=("cat", "dog")[i % 2],
            split=SPLITS[i % 4],
            group=f"patient {i // 3}",
            source="zoo",
            metadata={"age": i, "sex": None, "dose": 0.5},
            location=f"images/{i}",
        )
        for i in range(count)
    ]


def manifest(given: list[Row] | None = None, name: str = "zoo", parent: str | None = None) -> Manifest:
    return Manifest(name, ("cat", "dog"), tuple(rows() if given is None else given), parent)


def test_order_location_and_lineage_do_not_change_the_id() -> None:
    moved = [replace(row, location="elsewhere") for row in reversed(rows())]
    assert manifest(moved, name="other", parent="0" * 64).id == manifest().id
    assert [row.byte_hash for row in manifest(moved).rows] == [row.byte_hash for row in manifest().rows]


@pytest.mark.parametrize(
    "change",
    [
        {"label": "dog"},
        {"split": "test"},
        {"group": "x"},
        {"source": "x"},
        {"metadata": {"age": 1}},
        {"pixel_hash": "0" * 64},
        {"byte_hash": "0" * 64},
    ],
)
def test_every_part_of_a_row_changes_the_id(change: dict[str, object]) -> None:
    first, *others = rows()
    assert manifest([replace(first, **change), *others]).id != manifest().id  # type: ignore[arg-type]


def test_rows_are_a_multiset() -> None:
    twice = manifest([*rows(), rows()[0]])
    assert twice.id != manifest().id
    assert len(twice.rows) == 41


def test_class_order_is_part_of_the_version() -> None:
    assert Manifest("zoo", ("dog", "cat"), tuple(rows())).id != manifest().id


def test_the_id_stays_the_same_across_releases() -> None:
    """Changing this digest renames every data set that exists: raise FORMAT_VERSION and write a migration first."""
    assert manifest().id == "9c3a11e5e580d22b65bbe2606fa6ba8489e6af2dd236c553b27be0a19f5dc6cc"


def test_counts_name_every_split_and_class() -> None:
    counts = manifest(rows(4)).counts()
    assert counts == {
        "train": {"cat": 1, "dog": 0},
        "val": {"cat": 0, "dog": 1},
        "calibration": {"cat": 1, "dog": 0},
        "test": {"cat": 0, "dog": 1},
    }
    assert [row.split for row in manifest().of("val")] == ["val"] * 10
    assert Manifest("zoo", (), ()).counts() == {split: {} for split in SPLITS}


def test_saved_and_loaded_is_equal(objects: ObjectStore) -> None:
    saved = manifest([*rows(), rows()[3]])
    saved.save(objects)
    assert load_manifest(objects, saved.id) == saved
    assert tuple(iter_rows(objects, saved.id)) == saved.rows


def test_saving_twice_adds_nothing(objects: ObjectStore) -> None:
    manifest().save(objects)
    before = {key: objects.get(key) for key in objects.list()}
    manifest([replace(row, location="x") for row in rows()]).save(objects)
    assert {key: objects.get(key) for key in objects.list()} == before


def test_lineage_lists_versions_oldest_first(objects: ObjectStore) -> None:
    assert latest_version(objects, "zoo") is None
    first = manifest(rows(10))
    second = manifest(rows(11), parent=first.id)
    manifest(rows(12), name="zoo-annex").save(objects)
    first.save(objects)
    second.save(objects)
    first.save(objects)
    assert lineage(objects, "zoo") == (first.id, second.id)
    assert latest_version(objects, "zoo") == second.id
    assert load_manifest(objects, second.id).parent == first.id


def test_the_same_data_may_stand_in_two_lineages(objects: ObjectStore) -> None:
    manifest().save(objects)
    manifest(name="other", parent="1" * 64).save(objects)
    assert load_manifest(objects, manifest().id).name == "zoo"
    other = load_manifest(objects, manifest().id, name="other")
    assert (other.name, other.parent) == ("other", "1" * 64)
    with pytest.raises(NotFound, match="no version"):
        load_manifest(objects, manifest().id, name="third")


def test_a_changed_row_is_noticed(objects: ObjectStore) -> None:
    manifest().save(objects)
    key = dataset_key(manifest().id, "manifest.jsonl.gz")
    lines = gzip.decompress(objects.get(key)).splitlines()
    first = json.loads(lines[0])
    changed = first | {"label": {"cat": "dog", "dog": "cat"}[first["label"]]}
    objects.put(key, gzip.compress(b"\n".join([json.dumps(changed).encode(), *lines[1:]])))
    with pytest.raises(InvalidDataset, match="damaged"):
        load_manifest(objects, manifest().id)


@pytest.mark.parametrize("damage", [b"", b"\x1f\x8b", b"no gzip", gzip.compress(b"{}\n"), gzip.compress(b"[1]\n")])
def test_a_damaged_file_is_noticed(objects: ObjectStore, damage: bytes) -> None:
    manifest().save(objects)
    objects.put(dataset_key(manifest().id, "manifest.jsonl.gz"), damage)
    with pytest.raises(InvalidDataset, match="damaged"):
        load_manifest(objects, manifest().id)


def test_ids_are_checked_before_they_become_keys(objects: ObjectStore) -> None:
    with pytest.raises(InvalidRequest, match="64 hexadecimal digits"):
        load_manifest(objects, "../secrets")
    with pytest.raises(NotFound):
        load_manifest(objects, "0" * 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "cow"}, "none of the data set's classes"),
        ({"split": "holdout"}, "splits are"),
        ({"metadata": {"age": float("nan")}}, "leave such values empty"),
        ({"byte_hash": "xyz"}, "no SHA-256"),
    ],
)
def test_rows_that_cannot_be_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidDataset, match=message):
        manifest([replace(rows()[0], **change)])  # type: ignore[arg-type]
