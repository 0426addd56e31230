"""The grey pipeline of DICOM (PS3.4 N.2): stored values → modality LUT → VOI → display, one value at a time.

Since every step maps one value to one value, an image is mapped by a table of the values between its smallest and its
largest, which gives what mapping each pixel would and takes a tenth of the time and memory.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from medloop.errors import InvalidImage, UnsupportedImage
from medloop.vision.decode import Pixels

if TYPE_CHECKING:
    from pydicom import Dataset

_SIGNED_OFFSET: Final = 32_768
_MAX_TABLE: Final = 65_536
_BLOCK: Final = 1_000_000  # pixels mapped at once: bounds the indices (8 bytes each) that numpy makes

_Values = NDArray[np.float64]


def displayed_grey(stored: NDArray[Any], dataset: "Dataset", index: int) -> Pixels:
    """Integers [H, W] of frame `index` → uint8 or uint16 [H, W] as `medloop.vision.dicom.decode_dicom` says.

    Rescaling and window are those of the frame where the file has them by frame (enhanced objects, PS3.3 C.7.6.16.2).
    """
    rescale = _macro(dataset, index, "PixelValueTransformationSequence")
    voi = _macro(dataset, index, "FrameVOILUTSequence")

    def displayed(values: NDArray[Any]) -> Pixels:
        modality = _modality(values, dataset, rescale)
        if not np.isfinite(modality).all():
            raise InvalidImage("This DICOM file is damaged: its rescaling gives no numbers; export it again.")
        if voi.get("WindowWidth"):
            return _windowed(modality, voi)
        if sequence := voi.get("VOILUTSequence"):
            return _voi_lut(modality, sequence[0], dataset)
        return _units(modality, dataset, rescale)

    grey = _mapped(stored, displayed)
    if str(dataset.PhotometricInterpretation) == "MONOCHROME1":
        np.invert(grey, out=grey)
    return grey


def _macro(dataset: "Dataset", index: int, name: str) -> "Dataset":
    """Where the attributes of a functional group macro stand: with the frame, with all frames, or in the file."""
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or ()
    shared = dataset.get("SharedFunctionalGroupsSequence") or ()
    for groups in (*per_frame[index : index + 1], *shared[:1]):
        if items := groups.get(name):
            found: Dataset = items[0]
            return found
    return dataset


def _mapped(stored: NDArray[Any], function: Callable[[NDArray[Any]], Pixels]) -> Pixels:
    flat = stored.reshape(-1)
    low, high = int(flat.min()), int(flat.max())
    table = function(np.arange(low, high + 1)) if high - low < _MAX_TABLE else None
    blocks: list[Any] = []
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK].astype(np.int64)
        blocks.append(function(block) if table is None else table[block - low])
    mapped: Pixels = np.concatenate(blocks)
    return mapped.reshape(stored.shape)


def _modality(values: NDArray[Any], dataset: "Dataset", rescale: "Dataset") -> _Values:
    """PS3.3 C.11.1: by table, by slope and intercept, or as stored."""
    if sequence := dataset.get("ModalityLUTSequence"):
        return _looked_up(values, sequence[0], dataset)[0].astype(np.float64)
    units = values.astype(np.float64)
    if "RescaleSlope" in rescale and "RescaleIntercept" in rescale:
        units *= float(rescale.RescaleSlope)
        units += float(rescale.RescaleIntercept)
    return units


def _windowed(values: _Values, voi: "Dataset") -> NDArray[np.uint8]:
    """By PS3.3 C.11.2.1.2 (LINEAR) or C.11.2.1.3 (SIGMOID, LINEAR_EXACT)."""
    centre, width = (_first(voi.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if not (np.isfinite(centre) and 0 < width < np.inf):
        raise InvalidImage("This DICOM file is damaged: its window is no range of values; export it again.")
    function = str(voi.get("VOILUTFunction") or "LINEAR")
    if function == "SIGMOID":
        fraction = 1 / (1 + np.exp(-4 * (values - centre) / width))
    elif function == "LINEAR_EXACT":
        fraction = (values - centre) / width + 0.5
    else:
        fraction = (values - (centre - 0.5)) / max(width - 1, 1e-9) + 0.5
    return np.rint(np.clip(fraction, 0, 1) * 255).astype(np.uint8)


def _voi_lut(values: _Values, item: "Dataset", dataset: "Dataset") -> NDArray[np.uint8]:
    """PS3.3 C.11.2.1.1, with the table's whole range of outputs spread over 8 bits."""
    shown, bits = _looked_up(np.rint(values), item, dataset)
    eight: NDArray[np.uint8] = np.rint(np.clip(shown / (2**bits - 1), 0, 1) * 255).astype(np.uint8)
    return eight


def _looked_up(values: NDArray[Any], item: "Dataset", dataset: "Dataset") -> tuple[NDArray[np.int64], int]:
    """Values through a LUT (PS3.3 C.11.1.1.1), and how many bits its entries have; what lies outside takes the nearest
    entry."""
    entries, first, bits = (int(number) for number in item.LUTDescriptor)
    if not 8 <= bits <= 16:
        raise UnsupportedImage("This DICOM file has a lookup table of an unknown kind: export the image with a window.")
    data: Any = item.LUTData
    if isinstance(data, bytes):
        wide = "<u2" if dataset.file_meta.TransferSyntaxUID.is_little_endian else ">u2"
        packed = len(data) < 2 * (entries or _MAX_TABLE)  # entries of 8 bits need not take two bytes each
        data = np.frombuffer(data, np.uint8 if packed else wide)
    table = np.atleast_1d(np.asarray(data, dtype=np.int64))[: entries or _MAX_TABLE]
    return table[np.clip(values - first, 0, len(table) - 1).astype(np.int64)], bits


def _units(values: _Values, dataset: "Dataset", rescale: "Dataset") -> NDArray[np.uint16]:
    signed = int(dataset.get("PixelRepresentation") or 0) == 1 or float(rescale.get("RescaleIntercept") or 0) < 0
    units: NDArray[np.uint16] = np.clip(np.rint(values) + _SIGNED_OFFSET * signed, 0, 65_535).astype(np.uint16)
    return units


def _first(value: Any) -> float:
    """Windows come as one number or as several alternatives."""
    return float(value[0] if isinstance(value, Sequence) else value)
