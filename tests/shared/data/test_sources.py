"""Every kind of place gives the images that lie there, and says by name what is wrong with the others."""

import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from medloop.data.sources import PHANTOMS, RawImage, Source, open_source, phantom_source
from medloop.data.sources.source import slug
from medloop.errors import InvalidDataset, InvalidRequest, Issue
from medloop.storage.objects import open_objects
from medloop.vision.decode import DEFAULT_LIMITS, decode
from moto.server import ThreadedMotoServer
from numpy.typing import NDArray

Picture = Callable[..., bytes]
WriteTree = Callable[[Mapping[str, bytes]], Path]
NO_IMAGE = b"x"  # sources do not look inside


def images(source: Source) -> list[RawImage]:
    found = list(source.read())
    assert len(found) == source.count
    return [image for image in found if isinstance(image, RawImage)]


def issues(source: Source) -> list[Issue]:
    return [*source.issues, *(item for item in source.read() if isinstance(item, Issue))]


def places(source: Source) -> list[tuple[str, str | None, str]]:
    return [(image.label, image.split, image.name) for image in images(source)]


class TestClassFolders:
    def test_classes_are_folders(self, write_tree: WriteTree) -> None:
        source = open_source(str(write_tree({"dog/2.png": b"2", "cat/1.JPEG": b"1", "cat/deep/3.tif": b"3"})))
        assert source.classes == ("cat", "dog")
        assert source.suggested_name == "images"
        assert places(source) == [
            ("cat", None, "cat/1.JPEG"),
            ("cat", None, "cat/deep/3.tif"),
            ("dog", None, "dog/2.png"),
        ]
        assert [image.data for image in images(source)] == [b"1", b"3", b"2"]

    def test_splits_above_classes(self, write_tree: WriteTree) -> None:
        names = ("Training/a/1.png", "valid/a/2.png", "validation/b/3.png", "testing/b/4.png")
        source = open_source(str(write_tree(dict.fromkeys(names, NO_IMAGE))))
        assert {name: (label, split) for label, split, name in places(source)} == {
            "Training/a/1.png": ("a", "train"),
            "valid/a/2.png": ("a", "val"),
            "validation/b/3.png": ("b", "val"),
            "testing/b/4.png": ("b", "test"),
        }

    def test_a_class_may_be_called_test(self, write_tree: WriteTree) -> None:
        source = open_source(str(write_tree({"control/1.png": NO_IMAGE, "test/2.png": NO_IMAGE})))
        assert {(label, split) for label, split, _ in places(source)} == {("control", None), ("test", None)}

    def test_folders_around_everything_say_nothing(self, write_tree: WriteTree) -> None:
        files = {"archive/set/train/a/1.png": NO_IMAGE, "archive/set/test/b/2.png": NO_IMAGE}
        assert {(label, split) for label, split, _ in places(open_source(str(write_tree(files))))} == {
            ("a", "train"),
            ("b", "test"),
        }

    def test_hidden_files_are_passed_over_and_others_told(self, write_tree: WriteTree) -> None:
        files = ["a/1.png", "b/2.png", "a/.DS_Store", "__MACOSX/a/._1.png", ".git/x.png", "a/Thumbs.db", "b/notes.txt"]
        source = open_source(str(write_tree(dict.fromkeys(files, NO_IMAGE))))
        assert len(images(source)) == 2
        assert [(warning.kind, warning.where) for warning in source.warnings] == [
            ("ignored-file", "a/Thumbs.db, b/notes.txt")
        ]

    def test_images_in_no_class_or_beside_splits_are_errors(self, write_tree: WriteTree) -> None:
        source = open_source(str(write_tree({"a/1.png": NO_IMAGE, "b/1.png": NO_IMAGE, "stray.png": NO_IMAGE})))
        assert [(issue.kind, issue.where) for issue in issues(source)] == [("no-class", "stray.png")]
        files = ["train/a/1.png", "train/b/1.png", "more/a/1.png", "test/2.png"]
        source = open_source(str(write_tree({f"second/{name}": NO_IMAGE for name in files}) / "second"))
        assert {(issue.kind, issue.where) for issue in issues(source)} == {
            ("outside-splits", "more/a/1.png"),
            ("no-class", "test/2.png"),
        }

    def test_a_file_too_large_is_not_read(self, write_tree: WriteTree) -> None:
        root = write_tree({"a/1.png": NO_IMAGE, "b/huge.png": b""})
        with (root / "b/huge.png").open("wb") as file:
            file.truncate(DEFAULT_LIMITS.max_bytes + 1)  # sparse: takes no room
        (issue,) = issues(open_source(str(root)))
        assert (issue.kind, issue.where) == ("unreadable", "b/huge.png")


class TestZip:
    def pack(self, path: Path, files: Mapping[str, bytes]) -> str:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return str(path)

    def test_it_gives_what_the_folder_gives(self, tmp_path: Path, write_tree: WriteTree) -> None:
        files = {"set/a/1.png": b"1", "set/b/2.png": b"2", "__MACOSX/set/a/._1.png": b"", "set/readme.txt": b""}
        packed = open_source(self.pack(tmp_path / "My Set-3k.zip", files))
        folder = open_source(str(write_tree(files)))
        assert packed.suggested_name == "my-set-3k"
        assert images(packed) == images(folder)
        assert images(packed) == images(packed)
        assert packed.warnings == folder.warnings
        assert packed.origin == folder.origin

    def test_a_bomb_is_not_unpacked(self, tmp_path: Path) -> None:
        zeros = bytes(DEFAULT_LIMITS.max_bytes + 1)
        source = open_source(self.pack(tmp_path / "bomb.zip", {"a/1.png": b"1", "b/bomb.png": zeros}))
        assert [issue.where for issue in issues(source)] == ["b/bomb.png"]

    def test_a_damaged_member_is_an_issue(self, tmp_path: Path) -> None:
        path = tmp_path / "set.zip"
        self.pack(path, {"a/1.png": bytes(range(256)) * 4, "b/2.png": b"2"})
        data = bytearray(path.read_bytes())
        data[60] ^= 0xFF
        path.write_bytes(data)
        source = open_source(str(path))
        assert [(issue.kind, issue.where) for issue in issues(source)] == [("unreadable", "a/1.png")]
        assert [image.name for image in images(source)] == ["b/2.png"]

    @pytest.mark.parametrize("content", [b"", b"PK", b"no zip at all" * 100])
    def test_no_zip(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "set.zip").write_bytes(content)
        with pytest.raises(InvalidDataset, match=r"no readable \.zip"):
            open_source(str(tmp_path / "set.zip"))


class TestNpz:
    @pytest.fixture
    def save(self, tmp_path: Path) -> Callable[..., str]:
        def save(name: str = "cellmnist.npz", **changes: NDArray[np.generic] | None) -> str:
            random = np.random.default_rng(0)
            arrays: dict[str, NDArray[np.generic] | None] = {}
            for split, count in (("train", 6), ("val", 4), ("test", 3)):
                arrays[f"{split}_images"] = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
                arrays[f"{split}_labels"] = (np.arange(count) % 3).astype(np.uint8)[:, np.newaxis]
            with (tmp_path / name).open("wb") as file:
                kept = {key: value for key, value in (arrays | changes).items() if value is not None}
                np.savez(file, allow_pickle=True, **kept)  # true, so that one test can bring a pickle
            return str(tmp_path / name)

        return save

    def test_pixels_labels_and_splits(self, save: Callable[..., str]) -> None:
        source = open_source(save())
        assert source.classes == ("0", "1", "2")
        assert source.suggested_name == "cellmnist"
        found = images(source)
        assert Counter(image.split for image in found) == {"train": 6, "val": 4, "test": 3}
        assert [image.label for image in found[:6]] == ["0", "1", "2"] * 2
        expected = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
        for image, pixels in zip(found, expected, strict=False):
            np.testing.assert_array_equal(decode(image.data).pixels[..., 0], pixels)

    def test_colour_and_flat_labels_and_no_val(self, save: Callable[..., str]) -> None:
        colour = np.random.default_rng(1).integers(0, 256, (6, 9, 7, 3), dtype=np.uint8)
        labels = np.array([0, 1] * 3)
        source = open_source(save(train_images=colour, train_labels=labels, val_images=None, val_labels=None))
        np.testing.assert_array_equal(decode(images(source)[0].data).pixels, colour[0])
        assert {image.split for image in images(source)} == {"train", "test"}

    @pytest.mark.parametrize(
        "text", ["Platelets\nRBC\nWBC\n", "0 Platelets\n1 RBC\n2 WBC", "0: Platelets\r\n1: RBC\r\n2: WBC\r\n\r\n"]
    )
    def test_names_of_classes(self, save: Callable[..., str], tmp_path: Path, text: str) -> None:
        (tmp_path / "cellmnist.classes.txt").write_text(text)
        source = open_source(save())
        assert source.classes == ("Platelets", "RBC", "WBC")
        assert images(source)[1].label == "RBC"

    def test_labels_out_of_range_are_named(self, save: Callable[..., str], tmp_path: Path) -> None:
        (tmp_path / "cellmnist.classes.txt").write_text("one\ntwo\nthree\n")
        source = open_source(save(val_labels=np.array([0, 3, -1, 1])))
        assert [(issue.kind, issue.where, issue.detail) for issue in issues(source)] == [
            ("label-out-of-range", "val_labels[1]", "is 3; the 3 classes are 0 to 2"),
            ("label-out-of-range", "val_labels[2]", "is -1; the 3 classes are 0 to 2"),
        ]

    def test_many_labels_out_of_range_are_summed_up(self, save: Callable[..., str]) -> None:
        many = save(train_images=np.zeros((50, 4, 4), np.uint8), train_labels=np.full(50, -1))
        found = issues(open_source(many))
        assert len(found) == 21
        assert found[-1].detail == "and 30 more like these"

    def test_an_empty_file(self, tmp_path: Path) -> None:
        (tmp_path / "empty.npz").touch()
        with pytest.raises(InvalidDataset, match=r"empty\.npz is empty \(0 bytes\)"):
            open_source(str(tmp_path / "empty.npz"))

    @pytest.mark.parametrize("content", [b"nothing", b"PK\x03\x04 cut"])
    def test_no_npz(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(InvalidDataset, match=r"no readable \.npz"):
            open_source(str(tmp_path / "bad.npz"))

    def test_a_single_array(self, tmp_path: Path) -> None:
        with (tmp_path / "one.npz").open("wb") as file:
            np.save(file, np.zeros(3))
        with pytest.raises(InvalidDataset, match="single array"):
            open_source(str(tmp_path / "one.npz"))

    def test_a_pickle_is_never_opened(self, save: Callable[..., str]) -> None:
        with pytest.raises(InvalidDataset, match="plain arrays"):
            open_source(save(train_labels=np.array([{"a": 1}] * 6, dtype=object)))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"train_images": np.zeros((6, 28, 28), np.float32)}, r"train_images in .* float32 \[6, 28, 28\]"),
            ({"train_images": np.zeros((6, 28, 28, 28), np.uint8)}, "two-dimensional"),
            ({"train_images": np.zeros((5, 28, 28), np.uint8)}, "5 train_images but 6 train_labels"),
            ({"train_images": np.zeros((6, 0, 28), np.uint8)}, "train_images"),
            ({"test_labels": np.zeros((3, 14), np.uint8)}, "one label an image"),
            ({"test_labels": np.zeros(3)}, "test_labels in .* float64"),
            ({"test_labels": None}, "no test_labels"),
            ({"train_images": None, "train_labels": None}, "no train_images and train_labels"),
            ({"train_labels": np.full(6, 70_000)}, r"name the classes in cellmnist\.classes\.txt"),
        ],
    )
    def test_wrong_arrays(
        self, save: Callable[..., str], changes: dict[str, NDArray[np.generic]], message: str
    ) -> None:
        with pytest.raises(InvalidDataset, match=message):
            open_source(save(**changes))


class TestTables:
    def table(self, folder: Path, text: str, name: str = "table.csv") -> str:
        (folder / name).write_text(text)
        return str(folder / name)

    def test_columns(self, write_tree: WriteTree) -> None:
        root = write_tree({"x/1.png": b"1", "2.png": b"2"})
        text = "path,label,split,group,age,site\nx/1.png,cat,Train,p1,63,\n2.png,dog,valid,,7,north\n"
        source = open_source(self.table(root, "\ufeff" + text))
        first, second = images(source)
        assert (first.data, first.label, first.split, first.group) == (b"1", "cat", "train", "p1")
        assert first.metadata == {"age": "63", "site": None}
        assert (second.split, second.group, second.metadata["site"]) == ("val", "", "north")

    def test_parquet_keeps_types(self, write_tree: WriteTree) -> None:
        root = write_tree({"1.png": b"1", "2.png": b"2"})
        columns = {
            "path": ["1.png", "2.png"],
            "label": [10.0, 9.0],
            "age": [63, None],
            "dose": [0.5, float("nan")],
            "smoker": [True, False],
            "when": [date(2020, 1, 2), None],
        }
        pq.write_table(pa.table(columns), root / "table.parquet")
        source = open_source(str(root / "table.parquet"))
        assert source.classes == ("9", "10")
        first, second = images(source)
        assert first.metadata == {"age": 63, "dose": 0.5, "smoker": True, "when": "2020-01-02"}
        assert second.metadata == {"age": None, "dose": None, "smoker": False, "when": None}

    def test_what_is_wrong_is_named_by_row(self, write_tree: WriteTree) -> None:
        root = write_tree({"1.png": b"1"})
        rows = "path,label,split\n1.png,cat,train\nlost.png,cat,train\n1.png,,train\n1.png,dog,holdout\n"
        assert [(issue.kind, issue.where) for issue in issues(open_source(self.table(root, rows)))] == [
            ("missing-file", "table.csv, row 3"),
            ("no-label", "table.csv, row 4"),
            ("unknown-split", "table.csv, row 5"),
        ]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "no rows"),
            ("path,label\n", "no rows"),
            ("file,label\n1.png,cat\n", "no column `path`"),
            ("path,class\n1.png,cat\n", "no column `label`; it has path, class"),
            ("path,label\n1.png,cat,extra\n", "Line 2 .* as many fields"),
            ("path,label\n1.png\n", "Line 2 .* as many fields"),
            ('path,label\n"1.png,cat\n', "cannot be read as CSV"),
        ],
    )
    def test_no_manifest(self, tmp_path: Path, text: str, message: str) -> None:
        with pytest.raises(InvalidDataset, match=message):
            open_source(self.table(tmp_path, text))

    def test_other_encodings_and_no_parquet(self, tmp_path: Path) -> None:
        (tmp_path / "latin.csv").write_bytes("path,label\nä.png,ü\n".encode("latin-1"))
        with pytest.raises(InvalidDataset, match="UTF-8"):
            open_source(str(tmp_path / "latin.csv"))
        (tmp_path / "no.parquet").write_bytes(b"PAR1")
        with pytest.raises(InvalidDataset, match="no readable Parquet"):
            open_source(str(tmp_path / "no.parquet"))

    def test_a_folder_with_a_label_table(self, write_tree: WriteTree, tmp_path: Path) -> None:
        root = write_tree({"1.png": b"1", "sub/2.png": b"2"})
        elsewhere = self.table(tmp_path, "path,label\n1.png,cat\nsub/2.png,dog\n", "mine.csv")
        given = open_source(str(root), labels=elsewhere)
        (root / "labels.csv").write_bytes(Path(elsewhere).read_bytes())
        assert [image.data for image in images(given)] == [b"1", b"2"]
        assert [image.data for image in images(open_source(str(root)))] == [b"1", b"2"]
        with pytest.raises(InvalidRequest, match="goes with a folder"):
            open_source(elsewhere, labels=elsewhere)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket="clinic")
        yield "s3://clinic"
    server.stop()


def test_class_folders_in_s3(bucket: str, write_tree: WriteTree) -> None:
    files = {"train/a/1.png": b"1", "train/b/2.png": b"2", "test/a/3.png": b"3", "train/a/notes.txt": b""}
    store = open_objects(f"{bucket}/scans/2026")
    for name, data in files.items():
        store.put(name, data)
    source = open_source(f"{bucket}/scans/2026")
    assert source.suggested_name == "2026"
    folder = open_source(str(write_tree(files)))
    assert images(source) == images(folder)
    assert source.warnings == folder.warnings


def test_phantoms() -> None:
    source = phantom_source(per_class=2, size=32, seed=3)
    assert open_source(PHANTOMS).classes == source.classes
    found = images(source)
    assert Counter(image.label for image in found) == dict.fromkeys(source.classes, 2)
    assert {decode(image.data).pixels.shape for image in found} == {(32, 32, 1)}
    assert images(source) == found
    assert source.suggested_name == "phantoms"


def test_nothing_there_and_unknown_kinds(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataset, match="nothing at"):
        open_source(str(tmp_path / "gone"))
    (tmp_path / "set.rar").write_bytes(b"x")
    with pytest.raises(InvalidDataset, match=r"none of \.zip"):
        open_source(str(tmp_path / "set.rar"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Chest X-Rays (2019)", "chest-x-rays-2019"),
        ("bccd-cells_64", "bccd-cells_64"),
        ("", "dataset"),
        ("日本", "dataset"),
    ],
)
def test_names_of_lineages(name: str, expected: str) -> None:
    assert slug(name) == expected
    assert len(slug(name * 50)) <= 63
