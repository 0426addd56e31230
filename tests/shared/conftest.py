"""DICOM files made in code, of every kind that MedLoop reads."""

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom import Dataset, FileDataset, Sequence
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.encoders.base import get_encoder
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
    generate_uid,
)

MakeDicom = Callable[..., bytes]

GREY = np.arange(64, dtype=np.uint16).reshape(8, 8) * 60  # 0 to 3,780
COLOUR = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
_NATIVE = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)


def dicom(pixels: NDArray[Any] = GREY, *, syntax: UID = ExplicitVRLittleEndian, **attributes: Any) -> bytes:
    """A file of one patient, Jane Doe. `pixels` [H, W] or [H, W, 3]; `attributes` are set last, so they may contradict
    the pixels; `PixelData` brings encapsulated frames for compressed transfer syntaxes."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = attributes.get("SOPInstanceUID", generate_uid())
    meta.TransferSyntaxUID = syntax
    dataset = FileDataset(
        "", {}, bytes(128), meta, is_implicit_VR=syntax.is_implicit_VR, is_little_endian=syntax.is_little_endian
    )
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
    stored = pixels.astype(pixels.dtype.newbyteorder(">")) if syntax == ExplicitVRBigEndian else pixels
    dataset.PixelData = stored.tobytes() if syntax in _NATIVE else encapsulate([b"\xff\xd8 some codec's bytes"])
    for name, value in attributes.items():
        setattr(dataset, name, value)
    if (syntax in _NATIVE) or dataset["PixelData"].VR == "OB":
        dataset["PixelData"].VR = "OB" if pixels.itemsize == 1 or syntax not in _NATIVE else "OW"
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def lut(entries: NDArray[Any], first: int, bits: int) -> Sequence:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(entries), first, bits])
    item.add_new("LUTData", "OW", entries.astype("<u2").tobytes())
    return Sequence([item])


def item(**attributes: Any) -> Dataset:
    made = Dataset()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def compressed(pixels: NDArray[Any], syntax: UID) -> bytes:
    """Pixels as one encapsulated frame."""
    if syntax == RLELossless:
        deep = 8 * pixels.itemsize
        options = {
            "rows": pixels.shape[0], "columns": pixels.shape[1], "number_of_frames": 1,
            "samples_per_pixel": pixels.shape[2] if pixels.ndim == 3 else 1,
            "bits_allocated": deep, "bits_stored": deep,
            "pixel_representation": 0, "planar_configuration": 0,
            "photometric_interpretation": "RGB" if pixels.ndim == 3 else "MONOCHROME2",
        }  # fmt: skip
        return encapsulate([get_encoder(RLELossless).encode(pixels, **options)])
    buffer = BytesIO()
    image = Image.fromarray(pixels)
    if syntax == JPEG2000Lossless:
        image.save(buffer, "JPEG2000", no_jp2=True)
    else:
        image.save(buffer, "JPEG", quality=95)
    return encapsulate([buffer.getvalue()])


def many_scans(width: int, height: int, scans: int) -> bytes:
    """A progressive JPEG that says the same thing over and over: small, valid, and slow to decode."""
    buffer = BytesIO()
    Image.new("L", (width, height), 99).save(buffer, "JPEG", progressive=True)
    plain = buffer.getvalue()
    last = plain.rindex(b"\xff\xda")
    return plain[:-2] + plain[last:-2] * scans + plain[-2:]


def nested_sequences(depth: int) -> bytes:
    """Sequences in sequences, none of which ends."""
    level = struct.pack("<HH2sHI", 0x0028, 0x3010, b"SQ", 0, 2**32 - 1) + struct.pack("<HHI", 0xFFFE, 0xE000, 2**32 - 1)
    plain = dicom()
    start = plain.index(b"\x08\x00\x16\x00UI")
    return plain[:start] + level * depth + plain[start:]


def deflation_bomb(size: int) -> bytes:
    plain = dicom(syntax=DeflatedExplicitVRLittleEndian)
    (meta_length,) = struct.unpack_from("<I", plain, 140)
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    return plain[: 144 + meta_length] + deflater.compress(bytes(size)) + deflater.flush()


def _samples() -> dict[str, bytes]:
    random = np.random.default_rng(1)
    signed = random.integers(-1024, 3000, (9, 7), dtype=np.int16)
    frames = random.integers(0, 4096, (3, 8, 8), dtype=np.uint16)
    tables: dict[str, Any] = {}
    for index, colour in enumerate(("Red", "Green", "Blue")):
        tables[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 8]
        tables[f"{colour}PaletteColorLookupTableData"] = np.roll(np.arange(256, dtype=np.uint8), index * 9).tobytes()
    small = COLOUR[..., 0].copy()
    window: dict[str, Any] = {"WindowCenter": [1000, 5], "WindowWidth": [401, 5]}
    per_frame = [
        item(
            PixelValueTransformationSequence=[item(RescaleSlope=1, RescaleIntercept=-100 * n, RescaleType="US")],
            FrameVOILUTSequence=[item(WindowCenter=1000 + 100 * n, WindowWidth=500)],
        )
        for n in range(3)
    ]
    return {
        "16-bit": dicom(),
        "16-bit-signed": dicom(signed),
        "12-bit": dicom(BitsStored=12, HighBit=11),
        "8-bit": dicom(small),
        "1-bit": dicom(small, BitsAllocated=1, BitsStored=1, HighBit=0, PixelData=bytes(range(8))),
        "32-bit": dicom(GREY.astype(np.uint32) * 70_000),
        "implicit": dicom(syntax=ImplicitVRLittleEndian),
        "big-endian": dicom(syntax=ExplicitVRBigEndian),
        "deflated": dicom(syntax=DeflatedExplicitVRLittleEndian),
        "rescaled": dicom(signed, RescaleSlope=0.5, RescaleIntercept=-1000),
        "modality-lut": dicom(ModalityLUTSequence=lut(np.arange(3000)[::-1] * 20, 300, 16)),
        "window": dicom(**window),
        "window-exact": dicom(**window, VOILUTFunction="LINEAR_EXACT"),
        "window-sigmoid": dicom(**window, VOILUTFunction="SIGMOID"),
        "window-rescaled": dicom(signed, RescaleSlope=2, RescaleIntercept=-50, WindowCenter=40, WindowWidth=400),
        "voi-lut": dicom(VOILUTSequence=lut(np.arange(4096)[::-1], 0, 12)),
        "inverted": dicom(PhotometricInterpretation="MONOCHROME1"),
        "inverted-window": dicom(PhotometricInterpretation="MONOCHROME1", **window),
        "rgb": dicom(COLOUR),
        "rgb-planar": dicom(COLOUR, PlanarConfiguration=1, PixelData=COLOUR.transpose(2, 0, 1).tobytes()),
        "ybr": dicom(COLOUR, PhotometricInterpretation="YBR_FULL"),
        "palette": dicom(small, PhotometricInterpretation="PALETTE COLOR", **tables),
        "frames": dicom(GREY, NumberOfFrames=3, PixelData=frames.tobytes()),
        "frames-enhanced": dicom(
            GREY, NumberOfFrames=3, PixelData=frames.tobytes(), PerFrameFunctionalGroupsSequence=per_frame
        ),
        "rle": dicom(syntax=RLELossless, PixelData=compressed(GREY, RLELossless)),
        "rle-rgb": dicom(COLOUR, syntax=RLELossless, PixelData=compressed(COLOUR, RLELossless)),
        "jpeg": dicom(small, syntax=JPEGBaseline8Bit, PixelData=compressed(small, JPEGBaseline8Bit)),
        "jpeg-rgb": dicom(
            COLOUR, syntax=JPEGBaseline8Bit, PhotometricInterpretation="YBR_FULL_422",
            PixelData=compressed(COLOUR, JPEGBaseline8Bit),
        ),
        "jpeg-2000": dicom(syntax=JPEG2000Lossless, PixelData=compressed(GREY, JPEG2000Lossless)),
        "jpeg-2000-rgb": dicom(
            COLOUR, syntax=JPEG2000Lossless, PhotometricInterpretation="YBR_RCT",
            PixelData=compressed(COLOUR, JPEG2000Lossless),
        ),
    }  # fmt: skip


@pytest.fixture
def make_dicom() -> MakeDicom:
    return dicom


@pytest.fixture
def make_lut() -> Callable[[NDArray[Any], int, int], Sequence]:
    return lut


@pytest.fixture(scope="session")
def dicom_samples() -> dict[str, bytes]:
    return _samples()


@pytest.fixture(scope="session")
def slow_dicom() -> bytes:
    """Takes minutes to decode."""
    scans = encapsulate([many_scans(2048, 2048, 20_000)])
    return dicom(np.zeros((2048, 2048), np.uint8), syntax=JPEGBaseline8Bit, PixelData=scans)


@pytest.fixture
def make_nested_dicom() -> Callable[[int], bytes]:
    return nested_sequences


@pytest.fixture
def make_dicom_bomb() -> Callable[[int], bytes]:
    return deflation_bomb


@pytest.fixture
def make_slow_jpeg() -> Callable[[int, int, int], bytes]:
    return many_scans
