"""DICOM files to pixels, with everything that names a patient left behind.

Of a file only the attributes in `_ATTRIBUTES` are read, so that no other value of a header is ever held. Size and
number of pixels are checked, against the limits and against the length of the file, before anything is decoded. pydicom
parses and decodes; files of strangers belong into `medloop.vision.dicom_reader`, which does all this in a process of
its own.
"""

import logging
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from medloop.errors import ImageTooLarge, InvalidImage, UnsupportedImage
from medloop.vision.decode import DEFAULT_LIMITS, Limits, Pixels
from medloop.vision.dicom_grey import displayed_grey
from medloop.vision.dicom_header import read_attributes

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.uid import UID

NEEDS_PYDICOM: Final = "DICOM files need pydicom: install medloop with its extra `dicom`."
WARNINGS: Final = (
    "The file says that text is burned into the image: it may name the patient and mislead the model.",
    "This secondary capture does not say whether text is burned into it: look at it before you trust or share it.",
    "The file says that the patient can be recognised in the image.",
)

_PREAMBLE: Final = 128  # bytes of anything, then "DICM" (PS3.10 §7.1)
_META_GROUP, _TRANSFER_SYNTAX = 0x0002, 0x0010
_MAX_META: Final = 1_000  # elements before the data set; the standard knows about twenty
_LONG_VRS: Final = frozenset({b"OB", b"OW", b"UN", b"UT", b"SQ"})  # two reserved bytes, then a length of 32 bits
_SECONDARY_CAPTURE: Final = "1.2.840.10008.5.1.4.1.1.7"  # and, after a dot, its multi-frame kinds

_ATTRIBUTES: Final = (
    "SOPClassUID", "BurnedInAnnotation", "RecognizableVisualFeatures",
    "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "RescaleIntercept", "RescaleSlope", "ModalityLUTSequence", "PixelPresentation",
    "WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    *(f"{colour}PaletteColorLookupTableDescriptor" for colour in ("Red", "Green", "Blue")),
    *(f"{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")),
    *(f"Segmented{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")),
    "ExtendedOffsetTable", "ExtendedOffsetTableLengths", "PixelData",
)  # fmt: skip

_COLOURS: Final = frozenset({"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"})
_GREYS: Final = frozenset({"MONOCHROME1", "MONOCHROME2"})

# Which of pydicom's plugins decodes what. One each, so that lossy images give the same pixels wherever they are read;
# and none under the GPL (pylibjpeg is used with its OpenJPEG plugin alone). Uncompressed ones need none.
_NATIVE: Final = ""
_DECODERS: Final = {
    "1.2.840.10008.1.2": _NATIVE,
    "1.2.840.10008.1.2.1": _NATIVE,
    "1.2.840.10008.1.2.1.99": _NATIVE,  # the whole data set deflated
    "1.2.840.10008.1.2.2": _NATIVE,
    "1.2.840.10008.1.2.5": "pydicom",  # RLE
    "1.2.840.10008.1.2.4.50": "pillow",  # JPEG baseline
    "1.2.840.10008.1.2.4.51": "pillow",  # JPEG extended, of 8 bits
    "1.2.840.10008.1.2.4.57": "gdcm",  # JPEG lossless
    "1.2.840.10008.1.2.4.70": "gdcm",
    "1.2.840.10008.1.2.4.80": "pyjpegls",
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": "pillow",  # JPEG 2000
    "1.2.840.10008.1.2.4.91": "pillow",
    "1.2.840.10008.1.2.4.201": "pylibjpeg",  # high-throughput JPEG 2000
    "1.2.840.10008.1.2.4.202": "pylibjpeg",
    "1.2.840.10008.1.2.4.203": "pylibjpeg",
}
_JPEG_EXTENDED: Final = "1.2.840.10008.1.2.4.51"
_JPEG_2000: Final = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")


@dataclass(frozen=True, slots=True)
class DicomImage:
    """One frame. `pixels` is contiguous: uint8 [H, W, 1] where a window or VOI LUT applied, uint16 [H, W, 1] grey
    without one, uint8 [H, W, 3] colour. `warnings` are sentences out of `WARNINGS`."""

    pixels: Pixels
    warnings: tuple[str, ...] = ()


def is_dicom(data: bytes) -> bool:
    return data[_PREAMBLE : _PREAMBLE + 4] == b"DICM"


def has_pydicom() -> bool:
    """Whether DICOM can be read here: pydicom is an extra, for those who bring such files."""
    return find_spec("pydicom") is not None


def decode_dicom(data: bytes, frame: int | None = None, limits: Limits = DEFAULT_LIMITS) -> DicomImage:
    """The pixels of a DICOM file, or of its frame `frame` (from 1 on, as DICOM counts).

    Grey values are rescaled (modality LUT, PS3.3 C.11.1), then, with a window in the file (the first one, PS3.3
    C.11.2.1.2) or else a VOI LUT, brought to 8 bits by it. Without one they stay 16-bit units (Hounsfield in CT),
    rounded, plus 32,768 where the rescaled type can be negative. MONOCHROME1 is inverted. Colours become 8-bit RGB.

    Raises:
        InvalidImage: damaged, truncated, without pixels, or `frame` is not one of its frames.
        UnsupportedImage: a kind of pixels or a transfer syntax that is not read here; or pydicom is not installed.
        ImageTooLarge: beyond `limits`; known from the header, before pixels take memory.
    """
    with reading(data, _ATTRIBUTES, limits) as dataset:
        index = _index(dataset, frame)
        _check(dataset, limits)
        return DicomImage(_pixels(dataset, index), tuple(_warnings(dataset)))


@contextmanager
def reading(data: bytes, attributes: Iterable[str], limits: Limits = DEFAULT_LIMITS) -> Iterator["Dataset"]:
    """The named attributes of a DICOM file. The one edge to pydicom: values are parsed when they are looked at, so
    whatever is wrong with a file may come up anywhere in the `with` block, and becomes `InvalidImage`."""
    if not has_pydicom():
        raise UnsupportedImage(NEEDS_PYDICOM)
    from pydicom.config import disable_value_validation  # an extra, and half a second to import

    try:
        # What pydicom says about a file, to the log or as warnings, would quote what stands in its header.
        logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
        with disable_value_validation(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield _parsed(data, attributes, limits)
    except InvalidImage:
        raise
    except MemoryError as exc:
        raise ImageTooLarge("This DICOM file unpacks to more than memory allows: send a smaller image.") from exc
    except Exception as exc:
        raise InvalidImage("This DICOM file is damaged: export it again.") from exc


def _parsed(data: bytes, attributes: Iterable[str], limits: Limits) -> "Dataset":
    from pydicom.datadict import tag_for_keyword
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import UID

    if len(data) > limits.max_bytes:
        raise ImageTooLarge(
            f"The DICOM file has {len(data):,} bytes, more than the {limits.max_bytes:,} allowed: send a smaller one."
        )
    name, start = _transfer_syntax(data)
    if name not in _DECODERS:
        raise UnsupportedImage(
            "This DICOM file's transfer syntax is not one that MedLoop knows: convert it to Explicit VR Little Endian."
        )
    syntax = UID(name)
    if syntax.is_deflated:
        data, start = _inflated(data[start:], limits), 0
    tags = [tag for keyword in attributes if (tag := tag_for_keyword(keyword)) is not None]
    dataset = read_attributes(data, start, syntax, tags)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    return dataset


def _transfer_syntax(data: bytes) -> tuple[str, int]:
    """The transfer syntax UID, and where the data set begins. What stands before is always in Explicit VR Little Endian
    (PS3.10 §7.1), whatever follows."""
    name, position = b"", _PREAMBLE + 4
    for _ in range(_MAX_META):
        if position + 8 > len(data):
            break
        group, element, vr, length = struct.unpack_from("<HH2sH", data, position)
        if group != _META_GROUP:
            break
        position += 8
        if vr in _LONG_VRS:
            (length,) = struct.unpack_from("<I", data, position)
            position += 4
        if element == _TRANSFER_SYNTAX:
            name = data[position : position + length].rstrip(b"\x00 ")
        position += length
    if not name:
        raise InvalidImage("This DICOM file is damaged: it names no transfer syntax; export it again.")
    return name.decode("ascii"), position


def _inflated(data: bytes, limits: Limits) -> bytes:
    """A deflated data set (PS3.5 A.5), which may unpack to as much as a file may have."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = inflater.decompress(data, limits.max_bytes + 1)
    if len(inflated) > limits.max_bytes:
        raise ImageTooLarge(
            f"The DICOM file unpacks to more than the {limits.max_bytes:,} bytes allowed: send a smaller one."
        )
    if not inflater.eof:
        raise InvalidImage("This DICOM file is truncated: send the complete file.")
    return inflated


def _check(dataset: "Dataset", limits: Limits) -> None:
    """Refuse by what the header says alone."""
    from pydicom.pixels.utils import get_expected_length

    if "PixelData" not in dataset:
        raise InvalidImage("This DICOM file holds no image (or one of floating-point values): export the image itself.")
    width, height, samples = int(dataset.Columns), int(dataset.Rows), int(dataset.SamplesPerPixel)
    if min(width, height, samples) < 1:
        raise InvalidImage("This DICOM file is damaged: its image has no pixels; export it again.")
    if max(width, height) > limits.max_side or width * height > limits.max_pixels:
        raise ImageTooLarge(
            f"The image has {width:,}×{height:,} pixels; allowed are {limits.max_pixels:,} in all and "
            f"{limits.max_side:,} a side: send a smaller one."
        )
    photometric = str(dataset.PhotometricInterpretation)
    channels = 3 if photometric in _COLOURS else 1 if photometric in _GREYS or photometric == "PALETTE COLOR" else 0
    if samples != channels:
        raise UnsupportedImage("This DICOM file's kind of pixels is not read: export it as grey or RGB.")
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated:
        _check_compression(syntax, samples, int(dataset.BitsStored))
    elif dataset["PixelData"].is_undefined_length:
        raise InvalidImage("This DICOM file's pixels are not in the transfer syntax that it names: export it again.")
    elif len(dataset.PixelData) < get_expected_length(dataset):
        raise InvalidImage("This DICOM file is truncated: it has fewer pixels than its header says; send all of it.")


def _check_compression(syntax: "UID", samples: int, bits: int) -> None:
    from pydicom.pixels.decoders.base import get_decoder

    beyond_pillow = (syntax == _JPEG_EXTENDED and bits != 8) or (syntax in _JPEG_2000 and samples > 1 and bits > 8)
    if beyond_pillow or _DECODERS[syntax] not in get_decoder(syntax).available_plugins:
        raise UnsupportedImage(
            f"DICOM images compressed as {syntax.name} are not read here: convert the file to an uncompressed DICOM "
            "transfer syntax (Explicit VR Little Endian)."
        )


def _index(dataset: "Dataset", frame: int | None) -> int:
    frames = max(1, int(dataset.get("NumberOfFrames") or 1))
    if frame is None and frames > 1:
        raise InvalidImage(
            f"This DICOM file has {frames} frames: choose one by its number, 1 to {frames}, or export it alone."
        )
    if frame is not None and not 1 <= frame <= frames:
        raise InvalidImage(f"This DICOM file has no frame {frame}: choose one from 1 to {frames}.")
    return (frame or 1) - 1


def _pixels(dataset: "Dataset", index: int) -> Pixels:
    from pydicom.pixels.processing import apply_color_lut
    from pydicom.pixels.utils import pixel_array

    syntax = dataset.file_meta.TransferSyntaxUID
    stored: NDArray[Any] = pixel_array(dataset, index=index, decoding_plugin=_DECODERS[syntax])
    if str(dataset.PhotometricInterpretation) == "PALETTE COLOR":
        colours = apply_color_lut(stored, dataset)
        return _eight_bits(colours, 8 * colours.itemsize)
    if stored.ndim == 3:
        return _eight_bits(stored, int(dataset.BitsStored))
    return displayed_grey(stored, dataset, index)[..., np.newaxis]


def _eight_bits(colours: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    return np.ascontiguousarray(colours >> max(0, bits - 8), dtype=np.uint8)


def _warnings(dataset: "Dataset") -> Iterator[str]:
    burned_in, recognisable, undeclared = WARNINGS[0], WARNINGS[2], WARNINGS[1]
    if dataset.get("BurnedInAnnotation") == "YES":
        yield burned_in
    elif not dataset.get("BurnedInAnnotation") and f"{dataset.get('SOPClassUID')}.".startswith(
        f"{_SECONDARY_CAPTURE}."
    ):
        yield undeclared
    if dataset.get("RecognizableVisualFeatures") == "YES":
        yield recognisable
