"""DICOM: what the pixels become, and that nothing else of the file stays."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from medloop.data.sources import RawImage, open_source
from medloop.data.sources.dicom import is_dicom, plain_image, read_dicom
from medloop.errors import InvalidDataset, InvalidImage, Issue
from medloop.vision.decode import decode
from numpy.typing import NDArray
from pydicom import FileDataset
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEGLosslessSV1, generate_uid

GREY = np.arange(64, dtype=np.uint16).reshape(8, 8) * 60  # 0 to 3,780


def dicom(pixels: NDArray[Any] = GREY, **attributes: Any) -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = attributes.get("SOPInstanceUID", generate_uid())
    meta.TransferSyntaxUID = attributes.pop("syntax", ExplicitVRLittleEndian)
    dataset = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.PatientID, dataset.PatientName = "patient-17", "Doe^Jane"
    dataset.StudyInstanceUID = "1.2.3"
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = pixels.shape[2] if pixels.ndim == 3 else 1
    dataset.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    if pixels.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(np.issubdtype(pixels.dtype, np.signedinteger))
    plain = meta.TransferSyntaxUID == ExplicitVRLittleEndian
    dataset.PixelData = pixels.tobytes() if plain else encapsulate([b"\xff\xd8 some codec's bytes"])
    for name, value in attributes.items():
        setattr(dataset, name, value)
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def pixels_of(data: bytes) -> NDArray[Any]:
    return decode(read_dicom(data)[0]).pixels[..., 0]


def test_grey_stays_as_it_is() -> None:
    np.testing.assert_array_equal(pixels_of(dicom()), GREY)
    assert pixels_of(dicom()).dtype == np.uint16


def test_hounsfield_units_are_offset_whatever_way_they_are_stored() -> None:
    hounsfield = GREY.astype(np.int16) - 1024
    expected = hounsfield.astype(np.int32) + 32_768
    np.testing.assert_array_equal(pixels_of(dicom(hounsfield)), expected)
    np.testing.assert_array_equal(pixels_of(dicom(GREY, RescaleSlope=1, RescaleIntercept=-1024)), expected)
    np.testing.assert_array_equal(pixels_of(dicom(GREY // 60 * 30, RescaleSlope=2, RescaleIntercept=-1024)), expected)


def test_a_window_gives_eight_bits() -> None:
    """PS3.3 C.11.2.1.2: black up to c − 0.5 − (w − 1) / 2, white from c − 0.5 + (w − 1) / 2, a line between."""
    shown = pixels_of(dicom(WindowCenter=[1000, 5], WindowWidth=[401, 5]))
    assert shown.dtype == np.uint8
    exact = np.clip((GREY - 999.5) / 400 + 0.5, 0, 1) * 255
    np.testing.assert_array_equal(shown, np.rint(exact))
    sigmoid = pixels_of(dicom(WindowCenter=1000, WindowWidth=400, VOILUTFunction="SIGMOID"))
    np.testing.assert_array_equal(sigmoid, np.rint(255 / (1 + np.exp(-4 * (GREY - 1000.0) / 400))))
    linear = pixels_of(dicom(WindowCenter=1000, WindowWidth=400, VOILUTFunction="LINEAR_EXACT"))
    np.testing.assert_array_equal(linear, np.rint(np.clip((GREY - 1000.0) / 400 + 0.5, 0, 1) * 255))


def test_monochrome1_is_inverted() -> None:
    np.testing.assert_array_equal(pixels_of(dicom(PhotometricInterpretation="MONOCHROME1")), 65_535 - GREY)
    inverted = pixels_of(dicom(PhotometricInterpretation="MONOCHROME1", WindowCenter=1000, WindowWidth=401))
    np.testing.assert_array_equal(inverted, 255 - pixels_of(dicom(WindowCenter=1000, WindowWidth=401)))


def test_colour() -> None:
    colour = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode(read_dicom(dicom(colour))[0]).pixels, colour)


def test_the_group_is_the_patient_hashed_and_the_header_is_gone() -> None:
    image, group = read_dicom(dicom())
    _, same = read_dicom(dicom(StudyInstanceUID="9.9"))
    _, other = read_dicom(dicom(PatientID="patient-18"))
    _, study = read_dicom(dicom(PatientID=""))
    assert group == same
    assert len({group, other, study}) == 3
    assert len(group) == 16
    assert read_dicom(dicom(PatientID="", StudyInstanceUID=""))[1] == ""
    for secret in (b"patient-17", b"Doe", b"DICM", b"1.2.3"):
        assert secret not in image


# pydicom warns of a file that ends too early before it fails on it.
EARLY_END = pytest.mark.filterwarnings("ignore:End of file reached before delimiter:UserWarning")


@EARLY_END
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (dicom(np.zeros((8, 8), np.uint16), NumberOfFrames=4), "4 frames"),
        (dicom(syntax=JPEGLosslessSV1), "uncompressed DICOM transfer syntax"),
        (dicom()[:-20], "damaged"),
        (bytes(128) + b"DICM", "damaged"),
        (bytes(128) + b"DICM" + b"\xff" * 40, "damaged"),
        (dicom(Rows=0), "damaged"),
        (dicom(WindowWidth=400), "damaged"),
    ],
)
def test_what_cannot_be_read_is_an_issue(data: bytes, message: str) -> None:
    assert is_dicom(data)
    with pytest.raises(InvalidImage, match=message):
        read_dicom(data)
    issue, group = plain_image(data, "scan 3")
    assert isinstance(issue, Issue)
    assert (issue.kind, issue.where, group) == ("unreadable", "scan 3", "")


def read(root: Path, labels: str | None = None) -> tuple[list[RawImage], list[Issue], tuple[Issue, ...]]:
    source = open_source(str(root), labels=labels)
    found = list(source.read())
    return (
        [item for item in found if isinstance(item, RawImage)],
        [*source.issues, *(item for item in found if isinstance(item, Issue))],
        source.warnings,
    )


WriteTree = Callable[[dict[str, bytes]], Path]


@EARLY_END
def test_a_folder_labelled_by_instance(write_tree: WriteTree) -> None:
    files = {f"scan{i}": dicom(GREY + i, SOPInstanceUID=f"1.2.{i}", PatientID=f"p{i // 2}") for i in range(4)}
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


def test_a_folder_labelled_by_path_and_group(write_tree: WriteTree) -> None:
    files = {"a.dcm": dicom(), "b.dcm": dicom(GREY + 1)}
    files["labels.csv"] = b"path,label,group\na.dcm,cat,mine\nb.dcm,dog,\n"
    images, issues, _ = read(write_tree(files))
    assert not issues
    assert images[0].group == "mine"
    assert len(images[1].group) == 16


def test_class_folders_may_hold_dicom(write_tree: WriteTree) -> None:
    images, issues, _ = read(write_tree({"cat/a.dcm": dicom(), "dog/b.dcm": dicom(GREY + 1)}))
    assert not issues
    assert [image.label for image in images] == ["cat", "dog"]
    np.testing.assert_array_equal(decode(images[0].data).pixels[..., 0], GREY)


def test_a_label_table_without_a_key(write_tree: WriteTree) -> None:
    with pytest.raises(InvalidDataset, match="neither a column `path` nor `sop_instance_uid`"):
        read(write_tree({"labels.csv": b"name,label\na,b\n"}))
