"""DICOM: what the pixels become, what is refused, and that nothing else of the file comes out."""

import logging
import struct
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from medloop.errors import ImageTooLarge, InvalidImage, UnsupportedImage
from medloop.vision.decode import Limits
from medloop.vision.dicom import WARNINGS, decode_dicom, is_dicom
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.uid import (
    MPEG2MPML,
    HTJ2KLossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    RLELossless,
)

GREY = np.arange(64, dtype=np.uint16).reshape(8, 8) * 60  # as the samples hold it
MakeDicom = Callable[..., bytes]


def pixels_of(data: bytes) -> NDArray[Any]:
    return decode_dicom(data).pixels[..., 0]


@pytest.mark.parametrize("name", ["16-bit", "12-bit", "implicit", "big-endian", "deflated", "rle", "jpeg-2000"])
def test_grey_stays_as_it_is_however_it_is_stored(dicom_samples: dict[str, bytes], name: str) -> None:
    shown = pixels_of(dicom_samples[name])
    np.testing.assert_array_equal(shown, GREY)
    assert shown.dtype == np.uint16


@pytest.mark.parametrize("name", ["rgb", "rgb-planar", "rle-rgb", "jpeg-2000-rgb"])
def test_colour_stays_as_it_is_however_it_is_stored(dicom_samples: dict[str, bytes], name: str) -> None:
    expected = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode_dicom(dicom_samples[name]).pixels, expected)


def test_every_kind_has_a_promised_layout(dicom_samples: dict[str, bytes]) -> None:
    for name, data in dicom_samples.items():
        pixels = decode_dicom(data, frame=1).pixels
        kind = (pixels.dtype.name, pixels.shape[2])
        assert kind in {("uint8", 1), ("uint16", 1), ("uint8", 3)}, name
        assert pixels.flags.c_contiguous, name


def test_hounsfield_units_are_offset_whatever_way_they_are_stored(make_dicom: MakeDicom) -> None:
    hounsfield = GREY.astype(np.int16) - 1024
    expected = hounsfield.astype(np.int32) + 32_768
    np.testing.assert_array_equal(pixels_of(make_dicom(hounsfield)), expected)
    np.testing.assert_array_equal(pixels_of(make_dicom(GREY, RescaleSlope=1, RescaleIntercept=-1024)), expected)
    halved = make_dicom(GREY // 60 * 30, RescaleSlope=2, RescaleIntercept=-1024)
    np.testing.assert_array_equal(pixels_of(halved), expected)


def test_a_window_gives_eight_bits(dicom_samples: dict[str, bytes]) -> None:
    """PS3.3 C.11.2.1.2: black up to c − 0.5 − (w − 1) / 2, white from c − 0.5 + (w − 1) / 2, a line between."""
    shown = pixels_of(dicom_samples["window"])
    assert shown.dtype == np.uint8
    np.testing.assert_array_equal(shown, np.rint(np.clip((GREY - 999.5) / 400 + 0.5, 0, 1) * 255))
    exact = np.rint(np.clip((GREY - 1000.0) / 401 + 0.5, 0, 1) * 255)
    np.testing.assert_array_equal(pixels_of(dicom_samples["window-exact"]), exact)
    sigmoid = np.rint(255 / (1 + np.exp(-4 * (GREY - 1000.0) / 401)))
    np.testing.assert_array_equal(pixels_of(dicom_samples["window-sigmoid"]), sigmoid)


def test_lookup_tables(dicom_samples: dict[str, bytes], make_dicom: MakeDicom, make_lut: Callable[..., Any]) -> None:
    """Outside its range a table gives its first or last entry (PS3.3 C.11.1.1.1)."""
    modality = 20 * (2999 - np.clip(GREY.astype(np.int64) - 300, 0, 2999))
    np.testing.assert_array_equal(pixels_of(dicom_samples["modality-lut"]), modality)
    voi = pixels_of(dicom_samples["voi-lut"])
    assert voi.dtype == np.uint8
    np.testing.assert_array_equal(voi, np.rint((4095 - GREY.astype(np.int64)) / 4095 * 255))
    windowed = make_dicom(VOILUTSequence=make_lut(np.arange(9), 0, 12), WindowCenter=[1000, 5], WindowWidth=[401, 5])
    np.testing.assert_array_equal(pixels_of(windowed), pixels_of(dicom_samples["window"]))


def test_a_wide_range_of_values_is_mapped_like_a_narrow_one(make_dicom: MakeDicom) -> None:
    """Beyond 65,536 values there is no table, and more than a million pixels come in blocks."""
    wide = np.random.default_rng(0).integers(0, 2**31, (1200, 1000), dtype=np.uint32)
    expected = np.rint(np.clip((wide - 999_999.5) / 1e9 + 0.5, 0, 1) * 255)
    np.testing.assert_array_equal(pixels_of(make_dicom(wide, WindowCenter=10**6, WindowWidth=10**9 + 1)), expected)


def test_monochrome1_is_inverted(dicom_samples: dict[str, bytes]) -> None:
    np.testing.assert_array_equal(pixels_of(dicom_samples["inverted"]), 65_535 - GREY)
    np.testing.assert_array_equal(pixels_of(dicom_samples["inverted-window"]), 255 - pixels_of(dicom_samples["window"]))


def test_a_palette_is_expanded(dicom_samples: dict[str, bytes]) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)[..., :1].astype(int)
    expected = (stored - [0, 9, 18]) % 256
    np.testing.assert_array_equal(decode_dicom(dicom_samples["palette"]).pixels, expected)


def test_a_frame_is_chosen_by_its_number(dicom_samples: dict[str, bytes]) -> None:
    random = np.random.default_rng(1)
    random.integers(-1024, 3000, (9, 7), dtype=np.int16)
    frames = random.integers(0, 4096, (3, 8, 8), dtype=np.uint16)
    for number in (1, 2, 3):
        shown = decode_dicom(dicom_samples["frames"], number).pixels[..., 0]
        np.testing.assert_array_equal(shown, frames[number - 1])
        enhanced = decode_dicom(dicom_samples["frames-enhanced"], number).pixels[..., 0]
        centre, offset = 900 + 100 * number, -100 * (number - 1)
        values = frames[number - 1].astype(float) + offset
        np.testing.assert_array_equal(enhanced, np.rint(np.clip((values - centre + 0.5) / 499 + 0.5, 0, 1) * 255))
    with pytest.raises(InvalidImage, match=r"has 3 frames: choose one by its number, 1 to 3"):
        decode_dicom(dicom_samples["frames"])
    for absent in (0, 4, -1):
        with pytest.raises(InvalidImage, match=f"has no frame {absent}: choose one from 1 to 3"):
            decode_dicom(dicom_samples["frames"], absent)
    np.testing.assert_array_equal(decode_dicom(dicom_samples["16-bit"], 1).pixels[..., 0], GREY)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({}, ()),
        ({"BurnedInAnnotation": "YES"}, (WARNINGS[0],)),
        ({"BurnedInAnnotation": "NO", "RecognizableVisualFeatures": "YES"}, (WARNINGS[2],)),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, (WARNINGS[1],)),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7.4", "RecognizableVisualFeatures": "YES"}, WARNINGS[1:]),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "BurnedInAnnotation": "NO"}, ()),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.77.1.1"}, ()),
    ],
)
def test_what_may_name_the_patient_is_warned_of(
    make_dicom: MakeDicom, attributes: dict[str, str], expected: tuple[str, ...]
) -> None:
    assert decode_dicom(make_dicom(**attributes)).warnings == expected


def _refused(make: MakeDicom) -> dict[str, tuple[bytes, type[InvalidImage], str]]:
    damaged, plain, frames = InvalidImage, make(), {"NumberOfFrames": 4}
    jpeg = {"syntax": JPEGBaseline8Bit}
    return {
        "codec unknown": (make(syntax=JPEGLosslessSV1), UnsupportedImage, "uncompressed DICOM transfer syntax"),
        "codec absent": (make(syntax=HTJ2KLossless), UnsupportedImage, "High-Throughput JPEG 2000"),
        "12-bit JPEG": (make(syntax=JPEGExtended12Bit, BitsStored=12), UnsupportedImage, "JPEG Extended"),
        "video": (make(syntax=MPEG2MPML), UnsupportedImage, "Explicit VR Little Endian"),
        "no such syntax": (plain.replace(b"10008.1.2.1\0", b"10008.9.9.9\0"), UnsupportedImage, "convert"),
        "cut": (plain[:-20], damaged, "truncated"),
        "cut in the header": (plain[:500], damaged, "damaged|no image"),
        "too few frames": (make(**frames), damaged, "4 frames"),
        "nothing": (bytes(128) + b"DICM", damaged, "names no transfer syntax"),
        "noise": (bytes(128) + b"DICM" + b"\xff" * 40, damaged, "names no transfer syntax"),
        "no rows": (make(Rows=0), damaged, "no pixels"),
        "negative rows": (plain.replace(b"\x28\x00\x10\x00US\x02\x00\x08\x00", b"\x28\x00\x10\x00SS\x02\x00\xf8\xff"),
                          damaged, "no pixels"),
        "65,535 squared": (make(Rows=65_535, Columns=65_535), ImageTooLarge, "65,535×65,535"),
        "65,535 squared, packed": (make(Rows=65_535, Columns=65_535, **jpeg), ImageTooLarge, "65,535×65,535"),
        "many frames": (make(NumberOfFrames=2**31 - 1), damaged, "fewer pixels"),
        "half a window": (make(WindowWidth=400), damaged, "damaged"),
        "window of nothing": (make(WindowWidth=-4, WindowCenter=1), damaged, "window"),
        "slope of nothing": (make(RescaleSlope="1e999", RescaleIntercept=0), damaged, "rescaling"),
        "RLE said to be raw": (
            make(syntax=RLELossless, Rows=2).replace(b"1.2.840.10008.1.2.5\0", b"1.2.840.10008.1.2.1\0"),
            damaged, "not in the transfer syntax",
        ),
        "raw pixels said to be RLE": (
            plain.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0"), damaged, "damaged"
        ),
        "CMYK": (make(PhotometricInterpretation="CMYK"), UnsupportedImage, "grey or RGB"),
        "five samples": (make(SamplesPerPixel=5), UnsupportedImage, "grey or RGB"),
    }  # fmt: skip


def test_what_cannot_be_read_is_told_without_quoting_the_header(
    make_dicom: MakeDicom, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    cases = _refused(make_dicom)
    for name, (data, error, message) in cases.items():
        assert is_dicom(data)
        with pytest.raises(InvalidImage, match=message) as caught:
            decode_dicom(data, frame=1 if name == "many frames" else None)
        assert type(caught.value) is error, name
        assert "Doe" not in caught.value.detail, name
    assert "pydicom" not in {record.name.partition(".")[0] for record in caplog.records}


def test_a_file_without_pixels(make_dicom: MakeDicom) -> None:
    plain = make_dicom()
    with pytest.raises(InvalidImage, match="no image"):
        decode_dicom(plain[: plain.rindex(b"\xe0\x7f\x10\x00")])


def test_sequences_without_end_are_damage(make_nested_dicom: Callable[[int], bytes]) -> None:
    for depth in (10, 100_000):
        with pytest.raises(InvalidImage, match="damaged"):
            decode_dicom(make_nested_dicom(depth))


def test_a_deflated_file_unpacks_to_no_more_than_a_file_may_have(make_dicom_bomb: Callable[[int], bytes]) -> None:
    with pytest.raises(ImageTooLarge, match="unpacks to more than the 1,000,000 bytes"):
        decode_dicom(make_dicom_bomb(10**8), limits=Limits(max_bytes=10**6))


def _crowded(plain: bytes) -> dict[str, bytes]:
    """Files of few bytes, once deflated, and of more attributes than anybody can want to read."""
    start, pixels = plain.index(b"\x08\0\x16\0UI"), plain.index(b"\xe0\x7f\x10\0O")
    empty, item = b"\x09\0\x10\x10LO\0\0", struct.pack("<HHI", 0xFFFE, 0xE000, 0)
    open_ended = struct.pack("<HHIHH2sHI", 0xFFFE, 0xE000, 2**32 - 1, 0x7FE0, 0x10, b"OB", 0, 2**32 - 1)

    def frames(body: bytes, length: int | None = None) -> bytes:
        return struct.pack("<HH2sHI", 0x5200, 0x9230, b"SQ", 0, len(body) if length is None else length) + body

    return {
        "elements": plain[:start] + empty * 3_000_000 + plain[start:],
        "elements behind the pixels": plain + b"\xe1\x7f\x10\x10LO\0\0" * 3_000_000,
        "items": plain[:pixels] + frames(item * 1_000_000) + plain[pixels:],
        "items without end": plain[:pixels] + frames(item * 1_000_000, 2**32 - 1) + plain[pixels:],
        "values without end": plain[:pixels] + frames(open_ended * 20_000) + plain[pixels:],
        "fragments": plain[:pixels].replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0")
        + struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OB", 0, 2**32 - 1)
        + item * 3_000_000
        + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0),
    }


def test_crowds_of_empty_attributes_are_refused_soon(make_dicom: MakeDicom) -> None:
    for name, data in _crowded(make_dicom()).items():
        started = time.process_time()
        with pytest.raises(ImageTooLarge, match="too many attributes"):
            decode_dicom(data)
        assert time.process_time() - started < 2, name  # about 0.4; without the budget five and more


def test_the_attributes_of_many_frames_are_no_crowd(make_dicom: MakeDicom) -> None:
    frames = np.zeros((300, 2, 2), np.uint16)
    groups = []
    for number in range(len(frames)):
        window, frame = Dataset(), Dataset()
        window.WindowCenter, window.WindowWidth = number, 200
        frame.FrameVOILUTSequence = [window]
        for keyword in ("PixelMeasuresSequence", "PlanePositionSequence", "FrameContentSequence"):
            setattr(frame, keyword, [window] * 2)
        groups.append(frame)
    data = make_dicom(
        frames[0], NumberOfFrames=300, PixelData=frames.tobytes(), PerFrameFunctionalGroupsSequence=groups
    )
    first, last = (decode_dicom(data, frame).pixels for frame in (1, 300))
    assert (first.max(), last.max()) == (128, 0)


def test_pixels_come_once(make_dicom: MakeDicom) -> None:
    plain = make_dicom()
    with pytest.raises(InvalidImage, match="pixels twice"):
        decode_dicom(plain + plain[plain.index(b"\xe0\x7f\x10\0O") :])


def test_limits_hold(make_dicom: MakeDicom) -> None:
    for limits in (Limits(max_bytes=600), Limits(max_pixels=63), Limits(max_side=7)):
        with pytest.raises(ImageTooLarge):
            decode_dicom(make_dicom(), limits=limits)


def test_damage_raises_nothing_but_our_own_error(dicom_samples: dict[str, bytes]) -> None:
    random = np.random.default_rng(0)
    small = Limits(max_pixels=100_000)
    for data in dicom_samples.values():
        for _ in range(12):
            damaged = bytearray(data)
            for position in random.integers(132, len(damaged), size=random.integers(1, 8)):
                damaged[position] = random.integers(0, 256)
            try:
                decode_dicom(bytes(damaged), 1, small)
            except InvalidImage:
                continue
