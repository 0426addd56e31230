"""Reducing files to what makes their pixels."""

import struct
from collections.abc import Callable
from functools import partial
from io import BytesIO

import pytest
from medloop.errors import InvalidImage
from medloop.vision import containers
from medloop.vision.containers import exif_orientation, png_essentials, sniff
from PIL import Image

jpeg_essentials = partial(containers.jpeg_essentials, max_pixels=1_000_000)


def test_sniff_agrees_with_the_library(sample: bytes) -> None:
    with Image.open(BytesIO(sample)) as image:
        assert sniff(sample) == (image.format or "").replace("MPO", "JPEG")


def test_jpeg_keeps_the_segments_that_decide_about_colour(samples: dict[str, bytes]) -> None:
    assert b"JFIF" in jpeg_essentials(samples["jpeg-rgb"]).data
    assert b"Adobe" in jpeg_essentials(samples["jpeg-cmyk"]).data


def test_jpeg_thumbnail_in_the_jfif_segment_is_dropped(samples: dict[str, bytes]) -> None:
    plain = samples["jpeg-grey"]
    assert plain[2:4] == b"\xff\xe0"
    thumbnail = (
        b"\xff\xe0" + struct.pack(">H", 16 + 12) + b"JFIF\x00\x01\x02\x00\x00\x01\x00\x01\x02\x02" + b"\x99" * 12
    )
    assert jpeg_essentials(plain[:2] + thumbnail + plain[20:]).data == jpeg_essentials(plain).data


def test_jpeg_tolerates_fill_bytes_and_garbage_between_segments(samples: dict[str, bytes]) -> None:
    plain = samples["jpeg-grey"]
    assert jpeg_essentials(plain[:20] + b"\x00garbage\xff\xff" + plain[20:]).data == jpeg_essentials(plain).data


@pytest.mark.parametrize("reduce", [jpeg_essentials, png_essentials])
def test_endless_files_of_empty_parts_are_refused(reduce: Callable[[bytes], object]) -> None:
    part = b"\xff\xfe\x00\x02" if reduce is jpeg_essentials else b"\x00\x00\x00\x00juNK\x00\x00\x00\x00"
    with pytest.raises(InvalidImage, match="parts"):
        reduce(b"\x89PNG\r\n\x1a\n" + part * 70_000)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("value", range(1, 9))
def test_orientation_is_found_in_either_byte_order(order: str, value: int) -> None:
    assert exif_orientation(_exif(order, value)) == value


@pytest.mark.parametrize("cut", range(40))
def test_damaged_exif_means_upright(cut: int) -> None:
    block = _exif("<", 6)
    assert exif_orientation(block[:cut]) == (6 if cut >= len(block) else 1)


@pytest.mark.parametrize("value", [0, 9, 65_535])
def test_orientation_out_of_range_means_upright(value: int) -> None:
    assert exif_orientation(_exif(">", value)) == 1


def _exif(order: str, orientation: int) -> bytes:
    """An EXIF block of two entries: the image's width, then the orientation."""
    mark = b"II*\x00" if order == "<" else b"MM\x00*"
    entries = struct.pack(f"{order}HHII", 0x0100, 4, 1, 17) + struct.pack(f"{order}HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\x00\x00" + mark + struct.pack(f"{order}IH", 8, 2) + entries
