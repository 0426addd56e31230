"""Whatever the bytes, decoding gives pixels or one of our own refusals, soon and within memory.

In the suite the examples are always the same few hundred. With `MEDLOOP_FUZZ_EXAMPLES=200000` (and `--timeout=0`) these
tests look at that many new ones, some hundreds a second.
"""

import os
import resource
import struct
import time
import zlib
from collections.abc import Callable

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from medloop.errors import InvalidImage
from medloop.vision.decode import Limits, decode, read_header
from PIL import Image

_LONG = os.environ.get("MEDLOOP_FUZZ_EXAMPLES")
_EXAMPLES = int(_LONG or 250)
_LIMITS = Limits(max_pixels=200_000)
_SECONDS = 2.0  # of processor time for a file of at most some kilobytes: a hundred times what one takes
_EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)

# Of the bombs: those whose excess lies where nobody looks, so that the image itself can be shown.
_HARMLESS = {
    "more pixels than promised", "interlaced", "profile that unpacks", "text that unpacks", "restarts", "fill bytes",
    "fill bytes without a marker", "comment in pieces", "frames of a GIF", "tags that claim the file",
    "a page that follows itself", "a strip longer than the image",
    "a tile larger than the image, said second", "frames of a WebP", "chunks of a WebP",
}  # fmt: skip

PNG = b"\x89PNG\r\n\x1a\n"
Saver = Callable[..., bytes]


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width: int, height: int, packed: bytes, *, depth: int = 8, colour: int = 0, interlaced: int = 0, before: bytes = b""
) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    return PNG + chunk(b"IHDR", header) + before + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def tiff(tags: list[tuple[int, int, int, int]], body: bytes = b"", following: int = 0) -> bytes:
    """A directory of (tag, type, count, value) behind `body`, which lies at offset 8; then the next one's offset."""
    padded = body + bytes(len(body) % 2)
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    header = b"II*\0" + struct.pack("<I", 8 + len(padded))
    return header + padded + struct.pack("<H", len(tags)) + entries + struct.pack("<I", following)


def tiff_tags(
    width: int, height: int, compression: int = 1, size: int = 100, bits: int = 8
) -> list[tuple[int, int, int, int]]:
    return [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, bits), (259, 3, 1, compression), (262, 3, 1, 1),
        (273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, size),
    ]  # fmt: skip


def tiled(width: int, height: int, tile: int) -> list[tuple[int, int, int, int]]:
    """Of one deflated tile, at offset 8."""
    return [*tiff_tags(width, height, 8)[:5], (277, 3, 1, 1), (322, 4, 1, tile), (323, 4, 1, tile), (324, 4, 1, 8),
            (325, 4, 1, 20_000)]  # fmt: skip


def webp_canvas(width: int, height: int, flags: int, rest: bytes) -> bytes:
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"VP8X" + struct.pack("<I", 10) + bytes([flags, 0, 0, 0]) + sides + rest
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def bmp_rle(width: int, height: int, body: bytes) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(body), 0, 0, 1078) + header + bytes(1024) + body


def bombs(save: Saver, slow_jpeg: Callable[[int, int, int], bytes]) -> dict[str, bytes]:
    """Small files that ask for much: memory, passes over the image, steps of a parser written in Python."""
    deflated = zlib.compress(bytes(30_000_000), 9)
    grey = save(Image.new("L", (2_000, 2_000), 9), "JPEG", progressive=True)
    gif, webp = save(Image.new("P", (9, 9)), "GIF"), save(Image.new("RGB", (9, 9)), "WEBP", lossless=True)
    image, scan = gif.index(b"\x2c"), grey.index(b"\xff\xda") + 12
    frame = b"ANMF" + struct.pack("<I", 16 + len(webp) - 12) + bytes(6) + b"\x08\0\0\x08\0\0" + bytes(4) + webp[12:]
    liar = [(tag, 7, 500_000, 8) for tag in range(40_000, 60_000)]
    pieces, scans = struct.pack("<I", 8) * 70_000, slow_jpeg(1_000, 1_000, 3_000)
    return {
        "more pixels than promised": png(9, 9, deflated),
        "interlaced": png(1_500, 1_500, deflated, colour=6, interlaced=1),
        "profile that unpacks": png(9, 9, zlib.compress(bytes(90)), before=chunk(b"iCCP", b"x\0\0" + deflated)),
        "text that unpacks": png(9, 9, zlib.compress(bytes(90)), before=chunk(b"iTXt", b"x\0\1\0\0\0" + deflated) * 9),
        "tables": grey[:2] + (b"\xff\xdb\x00\x43\x00" + bytes([1] * 64)) * 50_000 + grey[2:],
        "no pixels at all": png(2_000, 2_000, b""),
        "scans": slow_jpeg(2_000, 2_000, 20_000),
        "scans of a large image": slow_jpeg(6_000, 6_000, 60),
        "restarts": save(Image.new("L", (2_000, 2_000), 9), "JPEG", restart_marker_blocks=1),
        "fill bytes": grey[:scan] + b"\xff" * 4_000_000 + grey[scan:],
        "fill bytes without a marker": grey[:scan] + b"\xff" * 4_000_000 + b"\0" + grey[scan:],
        "comment in pieces": gif[:image] + b"\x21\xfe" + (b"\xff" + b"a" * 255) * 60_000 + b"\0" + gif[image:],
        "comments": gif[:image] + b"\x21\xfe\x01a\0" * 1_000_000 + gif[image:],
        "frames of a GIF": gif[:image] + gif[image:-1] * 20_000 + b";",
        "tags that claim the file": tiff(tiff_tags(9, 9) + liar, bytes(500_000)),
        "a page that follows itself": tiff(tiff_tags(9, 9), bytes(100), following=108),
        "a directory in the header": b"II*\0\4\0\0\0" + bytes(200),
        "strips": tiff(
            [(256, 4, 1, 9), (257, 4, 1, 70_000), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 70_000, 8), (278, 4, 1, 1)],
            pieces,
        ),
        "tiles of a pixel": tiff(
            [*tiff_tags(300, 200)[:5], (322, 4, 1, 1), (323, 4, 1, 1), (324, 4, 60_000, 8), (325, 4, 60_000, 8)], pieces
        ),
        "a tile larger than the image": tiff(tiled(16, 16, 40_000), deflated),
        "a tile larger than the image, said second": tiff([*tiled(16, 16, 16), *tiled(16, 16, 40_000)], deflated),
        "tiles behind strips": tiff([*tiff_tags(16, 16, 8), *tiled(16, 16, 40_000)[6:8]], deflated),
        "a strip longer than the image": tiff(
            [*tiff_tags(16, 16, 8, len(deflated))[:7], (278, 4, 1, 2**31 - 1), (279, 4, 1, len(deflated))], deflated
        ),
        "TIFF with too many scans": tiff(tiff_tags(1_000, 1_000, 7, len(scans)), scans),
        "runs": bmp_rle(4_000, 4_000, b"\1\5" * 3_000_000),
        "runs without rows": bmp_rle(9, 9, b"\1\5" * 3_000_000),
        "a canvas without a picture": webp_canvas(16_383, 16_383, 0, webp[12:]),
        "frames of a WebP": webp_canvas(9, 9, 2, b"ANIM" + struct.pack("<I", 6) + bytes(6) + frame * 50_000),
        "chunks of a WebP": webp_canvas(9, 9, 0, (b"JUNK" + bytes(4)) * 500_000 + webp[12:]),
    }  # fmt: skip


def oddities(save: Saver) -> dict[str, bytes]:
    """Valid files of kinds that few programs write."""
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8)
    cmyk = save(Image.merge("CMYK", [Image.fromarray(ramp)] * 4), "JPEG")
    adobe = cmyk.index(b"Adobe")
    wide = b"".join(b"\0" + struct.pack(">8H", *range(0, 8000, 1000)) * 3 for _ in range(8))
    return {
        "RGB of 16 bits": png(8, 8, zlib.compress(wide), depth=16, colour=2),
        "grey + alpha of 16 bits": png(12, 8, zlib.compress(wide), depth=16, colour=4),
        "2 bits": png(8, 8, zlib.compress(bytes([0, 27, 228]) * 8), depth=2),
        "YCCK": cmyk[: adobe + 11] + b"\2" + cmyk[adobe + 12 :],
        "floating point": save(Image.new("F", (8, 8), 0.5), "TIFF"),
        "CIELAB": save(Image.new("LAB", (8, 8)), "TIFF"),
        "transparent palette": save(Image.fromarray(ramp).convert("P"), "PNG", transparency=bytes(range(64))),
        "big TIFF": save(Image.fromarray(ramp), "TIFF", big_tiff=True),
        "1-bit": save(Image.fromarray(ramp > 20), "TIFF", compression="group4"),
    }


def decodes_or_refuses(data: bytes, limits: Limits = _LIMITS) -> str:
    """The property; says which of the two it was."""
    started = time.process_time()
    try:
        header = read_header(data, limits)
        pixels = decode(data, limits).pixels
    except InvalidImage as error:
        outcome = type(error).__name__
    else:
        outcome = "pixels"
        assert sorted(pixels.shape[:2]) == sorted((header.height, header.width))
        assert pixels.flags.c_contiguous
        assert pixels.dtype == np.uint8 or (pixels.dtype == np.uint16 and pixels.shape[2] == 1)
    assert time.process_time() - started < _SECONDS
    return outcome


@st.composite
def damaged(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A valid file with bytes flipped, numbers made extreme, its end cut off, parts repeated, or another's end."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 5))):
        position = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(("flip", "flip", "extreme", "extreme", "cut", "repeat", "splice", "insert")))
        if kind == "flip":
            data[position : position + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "extreme":
            form = draw(st.sampled_from((">I", "<I", ">H", "<H")))
            value = draw(st.sampled_from(_EXTREMES)) & (0xFFFFFFFF if form[1] == "I" else 0xFFFF)
            data[position : position + struct.calcsize(form)] = struct.pack(form, value)
        elif kind == "cut":
            del data[position:]
        elif kind == "repeat":
            part = data[position : position + draw(st.integers(1, 60))]
            data[position:position] = part * draw(st.sampled_from((1, 2, 50)))
        elif kind == "splice":
            other = draw(st.sampled_from(seeds))
            data[position:] = other[draw(st.integers(0, len(other))) :]
        else:
            data[position:position] = draw(st.binary(min_size=1, max_size=8))
    return with_checksums(bytes(data)) if data.startswith(PNG) else bytes(data)


def with_checksums(data: bytes) -> bytes:
    """A damaged PNG whose chunks' checksums are right again, so that the damage is looked at."""
    parts, position = [PNG], len(PNG)
    while position + 12 <= len(data):
        length = min(int.from_bytes(data[position : position + 4], "big"), len(data) - position - 12)
        parts.append(data[position : position + 4])
        body = data[position + 4 : position + 8 + length]
        parts.append(body + struct.pack(">I", zlib.crc32(body)))
        position += 12 + length
    return b"".join(parts) + data[position:]


@settings(
    max_examples=_EXAMPLES,
    deadline=None,
    derandomize=_LONG is None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_damaged_files(samples: dict[str, bytes], save: Saver, data: st.DataObject) -> None:
    seeds = [*samples.values(), *oddities(save).values()]
    decodes_or_refuses(data.draw(damaged(seeds)))


def test_oddities(save: Saver) -> None:
    outcomes = {name: decodes_or_refuses(data) for name, data in oddities(save).items()}
    refused = {name for name, outcome in outcomes.items() if outcome != "pixels"}
    assert refused == {"floating point", "CIELAB"}


def test_bombs_cost_little(save: Saver, make_slow_jpeg: Callable[[int, int, int], bytes]) -> None:
    limits = Limits(max_pixels=40_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = {name: decodes_or_refuses(data, limits) for name, data in bombs(save, make_slow_jpeg).items()}
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300 * 1024  # KiB; the interlaced one alone takes 20 MiB
    assert {name for name, outcome in outcomes.items() if outcome == "pixels"} == _HARMLESS


def test_the_time_it_takes_follows_the_limits(save: Saver, make_slow_jpeg: Callable[[int, int, int], bytes]) -> None:
    """What unpacks slowly is too large where only small images are read, though it has few pixels."""
    scans, small = make_slow_jpeg(500, 500, 30), Limits(max_pixels=300_000)
    slow = {
        "runs": bmp_rle(200, 200, (b"\1\5" * 200 + b"\0\0") * 200 + b"\0\1"),
        "scans": scans,
        "TIFF of scans": tiff(tiff_tags(500, 500, 7, len(scans)), scans),
        "TIFF of scans, one strip": tiff(tiff_tags(500, 500, 7, 0), scans),
        "padding": tiff(tiled(16, 16, 1_024), zlib.compress(bytes(2**20)) + bytes(20_000)),
    }
    refused = {name for name, data in slow.items() if decodes_or_refuses(data, small) == "ImageTooLarge"}
    assert refused == slow.keys()
    assert [decodes_or_refuses(slow[name], Limits()) for name in ("runs", "scans", "padding")] == ["pixels"] * 3
