"""Frames: how pieces of bytes lie in a file one after the other, so that what a kill or a bad disk left can be told.

A frame is a header of twelve bytes and its payload. The header holds, as little-endian unsigned 32-bit numbers, the
payload's length, its CRC-32, and the CRC-32 of these eight bytes: so a damaged length is not taken for a cut-off end,
and behind a damaged payload reading goes on.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from zlib import crc32

_MEASURES = struct.Struct("<II")
_CHECK = struct.Struct("<I")
_HEADER = struct.Struct("<III")


@dataclass(frozen=True, slots=True)
class Parsed:
    """The payloads of a file's whole frames; `torn` where it ends within a frame, `damaged` where a checksum failed."""

    payloads: list[bytes]
    torn: bool
    damaged: bool


def join_frames(payloads: Iterable[bytes]) -> bytes:
    """One run of frames; each payload has less than 4 GiB."""
    pieces: list[bytes] = []
    for payload in payloads:
        measures = _MEASURES.pack(len(payload), crc32(payload))
        pieces += (measures, _CHECK.pack(crc32(measures)), payload)
    return b"".join(pieces)


def parse_frames(data: bytes) -> Parsed:
    """What `join_frames` made, as far as it is still there."""
    payloads: list[bytes] = []
    damaged, offset = False, 0
    while offset < len(data):
        start = offset + _HEADER.size
        if start > len(data):
            return Parsed(payloads, True, damaged)
        length, checksum, check = _HEADER.unpack_from(data, offset)
        if crc32(data[offset : offset + _MEASURES.size]) != check:
            return Parsed(payloads, False, True)  # where the next one starts is not known
        offset = start + length
        if offset > len(data):
            return Parsed(payloads, True, damaged)
        payload = data[start:offset]
        if crc32(payload) == checksum:
            payloads.append(payload)
        else:
            damaged = True
    return Parsed(payloads, False, damaged)
