"""DICOM files become plain grey or RGB images, and their headers stay behind.

What is kept of a header is how to read the pixels, and one pseudonym: the patient (or, without one, the study), hashed,
as the group that must not be torn between splits. The hash hides a name from a reader, not from somebody who can guess
it; where that matters, de-identify the files first (DICOM PS3.15 annex E).
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medloop.data.sources.source import UNREADABLE
from medloop.errors import InvalidDataset, InvalidImage, Issue
from medloop.vision.decode import Pixels
from medloop.vision.encode import encode_png_canonical

if TYPE_CHECKING:
    from pydicom import Dataset

_MAGIC = slice(128, 132)  # PS3.10 §7.1: 128 bytes of anything, then "DICM"
_SIGNED_OFFSET = 32_768
_GROUP_DIGITS = 16


def is_dicom(data: bytes) -> bool:
    return data[_MAGIC] == b"DICM"


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

    Grey values are rescaled (modality LUT, PS3.3 C.11.1), then, with a window in the file (the first one, PS3.3
    C.11.2.1.2), brought to 8 bits by it. Without one they stay 16-bit units (Hounsfield in CT), rounded, plus 32,768
    where the rescaled type can be negative. MONOCHROME1 is inverted. Raises `InvalidImage` for what cannot be read.
    """
    with _reading(data) as dataset:
        return encode_png_canonical(_pixels(dataset)), _group(dataset)


def instance_uid(data: bytes) -> str:
    """The SOP instance UID that label tables use; raises `InvalidImage`."""
    with _reading(data) as dataset:
        if uid := str(dataset.get("SOPInstanceUID") or ""):
            return uid
        raise InvalidImage("has no SOP instance UID; repair the file or label it by its path")


@contextmanager
def _reading(data: bytes) -> Iterator["Dataset"]:
    """The one edge to pydicom: values are read late, so whatever is wrong with a file may come up at any look at it."""
    try:
        # An extra of the distribution, and only for those who bring DICOM.
        from pydicom import dcmread
        from pydicom.config import disable_value_validation
    except ImportError as exc:
        raise InvalidDataset("DICOM files need pydicom; install medloop with its extra `data`.") from exc
    try:
        with disable_value_validation():  # its warnings would quote what stands in headers
            yield dcmread(BytesIO(data))
    except InvalidImage:
        raise
    except Exception as exc:
        raise InvalidImage("is damaged, or compressed; convert it to an uncompressed DICOM transfer syntax") from exc


def _pixels(dataset: "Dataset") -> Pixels:
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
    from pydicom.pixels.utils import pixel_array

    if (frames := int(dataset.get("NumberOfFrames") or 1)) > 1:
        raise InvalidImage(f"has {frames} frames; export the one that is meant")
    stored: NDArray[Any] = pixel_array(dataset)
    photometric = str(dataset.PhotometricInterpretation)
    if photometric == "PALETTE COLOR":
        colours = apply_color_lut(stored, dataset)
        return _eight_bits(colours, 8 * colours.itemsize)
    if stored.ndim == 3:
        return _eight_bits(stored, int(dataset.BitsStored))
    values = np.asarray(apply_modality_lut(stored, dataset), dtype=np.float64)
    grey: Pixels = _windowed(values, dataset) if dataset.get("WindowWidth") else _units(values, dataset)
    if photometric == "MONOCHROME1":
        np.invert(grey, out=grey)
    return grey


def _eight_bits(colours: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    return (colours >> max(0, bits - 8)).astype(np.uint8)


def _windowed(values: NDArray[np.float64], dataset: "Dataset") -> NDArray[np.uint8]:
    """[H, W] → uint8 by PS3.3 C.11.2.1.2 (LINEAR) or C.11.2.1.3 (SIGMOID, LINEAR_EXACT)."""
    centre, width = (_first(dataset.get(name)) for name in ("WindowCenter", "WindowWidth"))
    function = str(dataset.get("VOILUTFunction") or "LINEAR")
    if function == "SIGMOID":
        fraction = 1 / (1 + np.exp(-4 * (values - centre) / width))
    elif function == "LINEAR_EXACT":
        fraction = (values - centre) / width + 0.5
    else:
        fraction = (values - (centre - 0.5)) / max(width - 1, 1e-9) + 0.5
    return np.rint(np.clip(fraction, 0, 1) * 255).astype(np.uint8)


def _units(values: NDArray[np.float64], dataset: "Dataset") -> NDArray[np.uint16]:
    signed = int(dataset.get("PixelRepresentation") or 0) == 1 or float(dataset.get("RescaleIntercept") or 0) < 0
    units: NDArray[np.uint16] = np.clip(np.rint(values) + _SIGNED_OFFSET * signed, 0, 65_535).astype(np.uint16)
    return units


def _first(value: Any) -> float:
    """Windows come as one number or as several alternatives."""
    return float(value[0] if isinstance(value, Sequence) else value)


def _group(dataset: "Dataset") -> str:
    for name in ("PatientID", "StudyInstanceUID"):
        if value := str(dataset.get(name) or "").strip():
            return hashlib.sha256(f"medloop {name} {value}".encode()).hexdigest()[:_GROUP_DIGITS]
    return ""
