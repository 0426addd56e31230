"""DICOM files become plain grey or RGB images, and their headers stay behind.

Pixels are read by `medloop.vision.dicom`, as in serving. What a data set keeps of a header besides is one pseudonym:
the patient (or, without one, the study), hashed, as the group that must not be torn between splits. The hash hides a
name from a reader, not from somebody who can guess it; where that matters, de-identify the files first (DICOM PS3.15
annex E).
"""

import hashlib
from typing import Final

from medloop.data.sources.source import UNREADABLE
from medloop.errors import InvalidDataset, InvalidImage, Issue
from medloop.vision.dicom import NEEDS_PYDICOM, decode_dicom, has_pydicom, is_dicom, reading
from medloop.vision.encode import encode_png_canonical

_GROUP_DIGITS: Final = 16
_GROUPED_BY: Final = ("PatientID", "StudyInstanceUID")


def plain_image(data: bytes | Issue, name: str) -> tuple[bytes | Issue, str]:
    """What a source read, with DICOM turned into PNG, and the group that DICOM brings ("" otherwise)."""
    if isinstance(data, Issue) or not is_dicom(data):
        return data, ""
    try:
        return read_dicom(data)
    except InvalidImage as exc:
        return Issue(UNREADABLE, name, exc.detail), ""


def read_dicom(data: bytes) -> tuple[bytes, str]:
    """The image as canonical PNG, and its group.

    Raises:
        InvalidImage, UnsupportedImage, ImageTooLarge: as `medloop.vision.dicom.decode_dicom`.
        InvalidDataset: pydicom is not installed.
    """
    _need_pydicom()
    return encode_png_canonical(decode_dicom(data).pixels), _group(data)


def instance_uid(data: bytes) -> str:
    """The SOP instance UID that label tables use; raises as `read_dicom` does."""
    _need_pydicom()
    with reading(data, ["SOPInstanceUID"]) as dataset:
        if uid := str(dataset.get("SOPInstanceUID") or ""):
            return uid
        raise InvalidImage("This DICOM file has no SOP instance UID: repair it, or label it by its path.")


def _need_pydicom() -> None:
    """One missing package is one problem, not one with every file."""
    if not has_pydicom():
        raise InvalidDataset(NEEDS_PYDICOM)


def _group(data: bytes) -> str:
    with reading(data, _GROUPED_BY) as dataset:
        for name in _GROUPED_BY:
            if value := str(dataset.get(name) or "").strip():
                return hashlib.sha256(f"medloop {name} {value}".encode()).hexdigest()[:_GROUP_DIGITS]
    return ""
