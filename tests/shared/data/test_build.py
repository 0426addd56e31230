"""From a source to a version: what is stored, what is refused and how, and what the real files give."""

import hashlib
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from medloop.data.build import BuiltDataset, build_dataset
from medloop.data.leaks import load_leaks
from medloop.data.manifest import Split, lineage, load_manifest
from medloop.data.sources import RawImage, Source, open_source, phantom_source
from medloop.errors import Conflict, InvalidDataset, InvalidRequest, Issue, StorageFull
from medloop.storage.folder import FolderObjects
from medloop.storage.objects import ObjectStore
from medloop.vision.decode import decode, pixel_hash
from medloop.vision.encode import encode_png

Picture = Callable[..., bytes]
WriteTree = Callable[[Mapping[str, bytes]], Path]


def source_of(images: Sequence[RawImage | Issue], **changes: object) -> Source:
    labels = {image.label for image in images if isinstance(image, RawImage)}
    source = Source(tuple(sorted(labels)), "zoo", "test", len(images), lambda: iter(images))
    return replace(source, **changes)  # type: ignore[arg-type]


@pytest.fixture
def raw(picture: Picture) -> Callable[..., RawImage]:
    def make(
        seed: int, label: str | None = None, split: Split | None = None, group: str = "", data: bytes | None = None
    ) -> RawImage:
        return RawImage(data or picture(seed), label or "ab"[seed % 2], split, group, f"image {seed}")

    return make


def kinds(issues: Sequence[Issue]) -> list[str]:
    return [issue.kind for issue in issues]


def refused(source: Source, objects: ObjectStore) -> InvalidDataset:
    with pytest.raises(InvalidDataset) as caught:
        build_dataset(source, objects)
    assert not list(objects.list("datasets/"))
    assert not list(objects.list("lineages/"))
    return caught.value


Raw = Callable[..., RawImage]


class TestStoring:
    def test_rows_say_what_is_stored(self, objects: ObjectStore, raw: Raw) -> None:
        images = [replace(raw(seed, group=f"g{seed // 2}"), metadata={"age": seed}) for seed in range(20)]
        built = build_dataset(source_of(images), objects)
        assert len(built.manifest.rows) == 20
        by_age = {row.metadata["age"]: row for row in built.manifest.rows}
        for seed, image in enumerate(images):
            row = by_age[seed]
            stored = objects.get(row.location)
            assert row.location == f"images/{row.byte_hash[:2]}/{row.byte_hash}"
            assert hashlib.sha256(stored).hexdigest() == row.byte_hash
            assert row.pixel_hash == pixel_hash(decode(image.data).pixels)
            assert (row.label, row.group, row.source) == (image.label, image.group, "test")
        assert built.issues == ()
        assert load_manifest(objects, built.manifest.id) == built.manifest
        assert load_leaks(objects, built.manifest.id) == built.leaks

    def test_names_and_metadata_of_files_are_not_kept(
        self, objects: ObjectStore, write_tree: WriteTree, picture: Picture
    ) -> None:
        chunk = b"tEXt" + b"Name\x00Jane Doe"
        text = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        header = 33  # bytes: signature and IHDR
        files = {f"{'ab'[i % 2]}/Jane {i}.png": picture(i)[:header] + text + picture(i)[header:] for i in range(8)}
        assert decode(files["a/Jane 0.png"]).pixels.any()
        build_dataset(open_source(str(write_tree(files))), objects)
        assert not [key for key in objects.list() if b"Jane" in objects.get(key) or "Jane" in key]

    def test_the_same_data_gives_the_same_version_and_adds_nothing(self, objects: ObjectStore, raw: Raw) -> None:
        images = [raw(seed) for seed in range(30)]
        first = build_dataset(source_of(images), objects)
        before = {key: objects.get(key) for key in objects.list()}
        again = build_dataset(source_of(images[::-1]), objects)
        assert again == first
        assert {key: objects.get(key) for key in objects.list()} == before

    def test_elsewhere_and_under_another_name_it_is_the_same_version(
        self, objects: ObjectStore, raw: Raw, tmp_path: Path
    ) -> None:
        images = [raw(seed) for seed in range(30)]
        first = build_dataset(source_of(images), objects)
        other = build_dataset(source_of(images), FolderObjects(tmp_path / "elsewhere"), name="other")
        assert other.manifest.id == first.manifest.id
        assert other.manifest.name == "other"

    def test_an_image_twice_is_two_rows(self, objects: ObjectStore, raw: Raw) -> None:
        images = [raw(seed) for seed in range(10)]
        built = build_dataset(source_of([*images, images[0]]), objects)
        assert len(built.manifest.rows) == 11
        assert (built.leaks.exact, len(list(objects.list("images/")))) == (0, 10)

    def test_versions_of_a_lineage_inherit(self, objects: ObjectStore, raw: Raw) -> None:
        first = build_dataset(source_of([raw(seed) for seed in range(40)]), objects)
        second = build_dataset(source_of([raw(seed) for seed in range(60)]), objects)
        assert second.manifest.parent == first.manifest.id
        assert lineage(objects, "zoo") == (first.manifest.id, second.manifest.id)
        before = {row.byte_hash: row.split for row in first.manifest.rows}
        after = {row.byte_hash: row.split for row in second.manifest.rows}
        assert {byte_hash: after[byte_hash] for byte_hash in before} == before
        assert sorted(row.byte_hash for row in second.manifest.of("test")) == sorted(
            row.byte_hash for row in first.manifest.of("test")
        )
        back = build_dataset(source_of([raw(seed) for seed in range(40)]), objects)
        assert back.manifest == first.manifest
        assert len(lineage(objects, "zoo")) == 2

    def test_the_order_of_classes_is_the_lineages(self, objects: ObjectStore, raw: Raw) -> None:
        images = [raw(seed) for seed in range(20)]
        first = build_dataset(source_of(images, classes=("b", "a")), objects)
        second = build_dataset(source_of(images), objects)
        assert second.manifest == first.manifest
        assert first.manifest.classes == ("b", "a")

    def test_other_classes_need_another_name(self, objects: ObjectStore, raw: Raw) -> None:
        build_dataset(source_of([raw(seed) for seed in range(8)]), objects)
        others = source_of([raw(seed, "xy"[seed % 2]) for seed in range(8)])
        with pytest.raises(Conflict, match="classes a, b, and these images have x, y; choose another --name"):
            build_dataset(others, objects)
        assert build_dataset(others, objects, name="other").manifest.classes == ("x", "y")

    def test_names_are_checked(self, objects: ObjectStore, raw: Raw) -> None:
        with pytest.raises(InvalidRequest, match="cannot name a data set"):
            build_dataset(source_of([raw(0), raw(1)]), objects, name="../zoo")

    def test_progress_reaches_the_end(self, objects: ObjectStore) -> None:
        seen: list[tuple[str, int, int]] = []
        build_dataset(phantom_source(20, size=16), objects, progress=lambda *step: seen.append(step))
        assert [step[1] for step in seen] == sorted(step[1] for step in seen)
        assert seen[-1] == ("reading images", 120, 120)

    def test_a_full_disk_is_told_as_such(self, tmp_path: Path, raw: Raw) -> None:
        def full(descriptor: int, data: memoryview) -> int:
            raise OSError(28, "No space left on device")

        with pytest.raises(StorageFull, match="full"):
            build_dataset(source_of([raw(0), raw(1)]), FolderObjects(tmp_path, write=full))


class TestErrors:
    def test_unreadable_files_are_named_all_at_once(
        self, objects: ObjectStore, write_tree: WriteTree, picture: Picture
    ) -> None:
        bad = {"a/empty.png": b"", "a/text.jpg": b"no image", "b/cut.png": picture(0)[:60]}
        good = {f"{'ab'[i % 2]}/{i}.png": picture(i) for i in range(10)}
        source = open_source(str(write_tree(bad | good)))
        error = refused(source, objects)
        assert [(issue.kind, issue.where) for issue in error.issues] == [("unreadable", name) for name in sorted(bad)]
        assert "--skip-unreadable" in error.detail
        assert "2 more problems" in error.detail
        built = build_dataset(source, objects, skip_unreadable=True)
        assert len(built.manifest.rows) == 10
        assert [(issue.kind, issue.where) for issue in built.issues] == [("unreadable", name) for name in sorted(bad)]

    def test_an_image_that_promises_too_many_pixels(
        self, objects: ObjectStore, write_tree: WriteTree, picture: Picture
    ) -> None:
        body = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
        huge = picture(0)[:8] + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + picture(0)[33:]
        files = {"a/huge.png": huge, "b/1.png": picture(1), "a/2.png": picture(2)}
        error = refused(open_source(str(write_tree(files))), objects)
        assert [(issue.kind, issue.where) for issue in error.issues] == [("unreadable", "a/huge.png")]

    def test_a_missing_file_is_an_error_also_when_unreadable_ones_are_skipped(
        self, objects: ObjectStore, write_tree: WriteTree, picture: Picture
    ) -> None:
        root = write_tree({"1.png": picture(1), "2.png": picture(2)})
        (root / "table.csv").write_text("path,label\n1.png,a\n2.png,b\ngone.png,a\n")
        with pytest.raises(InvalidDataset, match=r"row 4: names gone\.png") as caught:
            build_dataset(open_source(str(root / "table.csv")), objects, skip_unreadable=True)
        assert kinds(caught.value.issues) == ["missing-file"]

    def test_no_images(self, objects: ObjectStore, tmp_path: Path) -> None:
        assert kinds(refused(open_source(str(tmp_path)), objects).issues) == ["no-images"]

    def test_only_one_class(self, objects: ObjectStore, raw: Raw) -> None:
        assert kinds(refused(source_of([raw(seed, "a") for seed in range(4)]), objects).issues) == ["one-class"]

    def test_a_class_that_is_judged_but_not_trained(self, objects: ObjectStore, raw: Raw) -> None:
        images = [raw(0, "a", "train"), raw(1, "b", "train"), raw(2, "c", "test"), raw(3, "c", "val")]
        (issue,) = refused(source_of(images), objects).issues
        assert (issue.kind, issue.where) == ("class-not-in-train", "'c' (test/val)")

    def test_no_train_at_all(self, objects: ObjectStore, raw: Raw) -> None:
        assert kinds(refused(source_of([raw(0, "a", "test"), raw(1, "b", "val")]), objects).issues) == ["no-train"]

    def test_class_names_that_only_case_or_spaces_tell_apart(self, objects: ObjectStore, raw: Raw) -> None:
        images = [raw(0, "Cat", "train"), raw(1, "dog", "train"), raw(2, "cat ", "test"), raw(3, "dog", "test")]
        (issue,) = refused(source_of(images), objects).issues
        assert issue.kind == "class-names-differ"
        assert issue.where == "'Cat' (train), 'cat ' (test)"

    def test_everything_is_told_together(self, objects: ObjectStore, raw: Raw) -> None:
        lost = Issue("missing-file", "row 9", "is lost")
        images: list[RawImage | Issue] = [raw(0, "a", "train"), raw(1, "b", "test"), raw(2, "a", data=b"x"), lost]
        warned = Issue("ignored-file", "notes.txt", "is no image")
        error = refused(source_of(images, warnings=(warned,)), objects)
        assert kinds(error.issues) == ["unreadable", "missing-file", "class-not-in-train", "ignored-file"]
        assert error.extra["issues"][1] == {"kind": "missing-file", "where": "row 9", "detail": "is lost"}


class TestWarnings:
    def built(self, objects: ObjectStore, images: Sequence[RawImage], **changes: object) -> BuiltDataset:
        return build_dataset(source_of(images, **changes), objects)

    def test_small_classes(self, objects: ObjectStore, raw: Raw) -> None:
        images = [raw(seed, "a", ("train", "test")[seed % 2]) for seed in range(8)]
        images += [raw(20, "b", "train"), raw(21, "b", "train"), raw(22, "c", "train")]
        built = self.built(objects, images, classes=("a", "b", "c", "d"))
        assert {(issue.kind, issue.where) for issue in built.issues} == {
            ("class-without-test", "b"),
            ("one-image-class", "c"),
            ("empty-class", "d"),
        }
        assert built.manifest.classes == ("a", "b", "c")

    def test_mixed_modes_are_counted(self, objects: ObjectStore, raw: Raw, picture: Picture) -> None:
        deep = encode_png(np.arange(64, dtype=np.uint16).reshape(8, 8, 1))
        images = [raw(seed) for seed in range(6)] + [raw(10, data=picture(10, 24, 3)), raw(11, data=deep)]
        (issue,) = self.built(objects, images).issues
        assert issue.kind == "mixed-modes"
        assert "(grey, 8 bits: 6; RGB, 8 bits: 1; grey, 16 bits: 1)" in issue.detail

    def test_equal_pixels_with_two_labels(self, objects: ObjectStore, raw: Raw, picture: Picture) -> None:
        images = [raw(seed) for seed in range(8)] + [replace(raw(0, "b"), name="the other")]
        (issue,) = self.built(objects, images).issues
        assert issue.kind == "label-conflict"
        assert issue.where == "image 0 (a) = the other (b)"


class TestRealFiles:
    """Counts and leaks as the data's own README states them."""

    @pytest.mark.parametrize(
        ("file", "counts", "classes", "leaks"),
        [
            ("breastmnist.npz", (546, 78, 156), ("0", "1"), {"train/test": 1}),
            ("pneumoniamnist.npz", (4708, 524, 624), ("0", "1"), {"train/val": 6, "train/calibration": 2}),
        ],
    )
    def test_medmnist(
        self,
        objects: ObjectStore,
        shared_data: Path,
        file: str,
        counts: tuple[int, int, int],
        classes: tuple[str, ...],
        leaks: dict[str, int],
    ) -> None:
        built = build_dataset(open_source(str(shared_data / file)), objects)
        manifest = built.manifest
        sizes = {split: sum(of_class.values()) for split, of_class in manifest.counts().items()}
        assert (sizes["train"], sizes["val"] + sizes["calibration"], sizes["test"]) == counts
        assert abs(sizes["val"] - sizes["calibration"]) <= 2
        assert manifest.classes == classes
        assert built.leaks.exact == sum(leaks.values())
        assert {pair: count.exact for pair, count in built.leaks.by_split.items() if count.exact} == leaks

    def test_turned_copies_are_found(self, objects: ObjectStore, shared_data: Path) -> None:
        """LC25000 was enlarged by mirroring and turning: a random split of it leaks, and the report says so."""
        whole = open_source(str(shared_data / "lc25000-lung-3k.zip"))
        some = [image for i, image in enumerate(whole.read()) if i % 3 == 0]
        built = build_dataset(replace(whole, count=len(some), read=lambda: iter(some)), objects)
        assert built.leaks.exact == 0
        assert built.leaks.near >= 10
