"""DICOM in data sets: the same pixels as in serving, one pseudonym, and nothing else of the file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from medloop.data.sources import RawImage, open_source
from medloop.data.sources.dicom import plain_image, read_dicom
from medloop.errors import InvalidDataset, Issue
from medloop.vision.decode import decode
from medloop.vision.dicom import decode_dicom

GREY = np.arange(64, dtype=np.uint16).reshape(8, 8) * 60
MakeDicom = Callable[..., bytes]
WriteTree = Callable[[dict[str, bytes]], Path]


def test_the_pixels_are_those_of_serving(dicom_samples: dict[str, bytes]) -> None:
    for name, data in dicom_samples.items():
        if not name.startswith("frames"):
            shown = decode_dicom(data).pixels
            kept = decode(read_dicom(data)[0]).pixels
            np.testing.assert_array_equal(kept, shown, name)
            assert kept.dtype == shown.dtype, name


def test_the_group_is_the_patient_hashed_and_the_header_is_gone(make_dicom: MakeDicom) -> None:
    image, group = read_dicom(make_dicom())
    _, same = read_dicom(make_dicom(StudyInstanceUID="9.9"))
    _, other = read_dicom(make_dicom(PatientID="patient-18"))
    _, study = read_dicom(make_dicom(PatientID=""))
    assert group == same
    assert len({group, other, study}) == 3
    assert len(group) == 16
    assert read_dicom(make_dicom(PatientID="", StudyInstanceUID=""))[1] == ""
    for secret in (b"patient-17", b"Doe", b"DICM", b"1.2.3"):
        assert secret not in image


def test_what_cannot_be_read_is_an_issue(dicom_samples: dict[str, bytes]) -> None:
    for data, message in ((dicom_samples["frames"], "3 frames"), (dicom_samples["rgb"][:-20], "truncated")):
        issue, group = plain_image(data, "scan 3")
        assert isinstance(issue, Issue)
        assert (issue.kind, issue.where, group) == ("unreadable", "scan 3", "")
        assert message in issue.detail


def read(root: Path, labels: str | None = None) -> tuple[list[RawImage], list[Issue], tuple[Issue, ...]]:
    source = open_source(str(root), labels=labels)
    found = list(source.read())
    return (
        [item for item in found if isinstance(item, RawImage)],
        [*source.issues, *(item for item in found if isinstance(item, Issue))],
        source.warnings,
    )


def test_a_folder_labelled_by_instance(write_tree: WriteTree, make_dicom: MakeDicom) -> None:
    files = {f"scan{i}": make_dicom(GREY + i, SOPInstanceUID=f"1.2.{i}", PatientID=f"p{i // 2}") for i in range(4)}
    files |= {"readme.txt": b"hello", "broken.dcm": bytes(128) + b"DICM" + b"\xff" * 40}
    files["labels.csv"] = b"sop_instance_uid,label,site\n1.2.0,cat,north\n1.2.1,cat,\n1.2.2,dog,\n1.2.9,dog,\n"
    images, issues, warnings = read(write_tree(files))
    assert [image.label for image in images] == ["cat", "cat", "dog"]
    assert images[0].group == images[1].group != images[2].group
    assert images[0].metadata == {"site": "north"}
    assert {(issue.kind, issue.where) for issue in issues} == {
        ("missing-file", "labels.csv, row 5"),
        ("unreadable", "broken.dcm"),
    }
    assert [(warning.kind, warning.where) for warning in warnings] == [("unlabelled", "scan3")]


def test_a_folder_labelled_by_path_and_group(write_tree: WriteTree, make_dicom: MakeDicom) -> None:
    files = {"a.dcm": make_dicom(), "b.dcm": make_dicom(GREY + 1)}
    files["labels.csv"] = b"path,label,group\na.dcm,cat,mine\nb.dcm,dog,\n"
    images, issues, _ = read(write_tree(files))
    assert not issues
    assert images[0].group == "mine"
    assert len(images[1].group) == 16


def test_class_folders_may_hold_make_dicom(write_tree: WriteTree, make_dicom: MakeDicom) -> None:
    images, issues, _ = read(write_tree({"cat/a.dcm": make_dicom(), "dog/b.dcm": make_dicom(GREY + 1)}))
    assert not issues
    assert [image.label for image in images] == ["cat", "dog"]
    np.testing.assert_array_equal(decode(images[0].data).pixels[..., 0], GREY)


def test_a_label_table_without_a_key(write_tree: WriteTree) -> None:
    with pytest.raises(InvalidDataset, match="neither a column `path` nor `sop_instance_uid`"):
        read(write_tree({"labels.csv": b"name,label\na,b\n"}))
