"""The process that decodes strangers' DICOM files: `python -m medloop.vision.dicom_worker MEMORY_BYTES SECONDS`.

It reads requests from standard input and writes answers to standard output until its input ends, which is also how it
learns that its parent is gone. Started and watched by `medloop.vision.dicom_reader`. The wire, big-endian:

    request   REQUEST (frame, 0 for none; length; the three limits), then the file
    answer    READY once at the start; then for each request
              ANSWER with status IMAGE (bits per value, height, width, channels, set of warnings), then the pixels, or
              ANSWER with another status and the length of a sentence in UTF-8, then that sentence
"""

import os
import resource
import struct
import sys
from dataclasses import astuple
from typing import BinaryIO, Final

from medloop.errors import ImageTooLarge, InvalidImage, UnsupportedImage
from medloop.vision.decode import Limits
from medloop.vision.dicom import WARNINGS, DicomImage, decode_dicom

REQUEST: Final = struct.Struct(">IQQQQ")
ANSWER: Final = struct.Struct(">BBIIBB")
READY: Final = b"\x06"

# The reader ends a worker that says OUT_OF_MEMORY: what allocations left behind would take from the next file's share.
IMAGE, INVALID, UNSUPPORTED, TOO_LARGE, OUT_OF_MEMORY = range(5)

_OPEN_FILES: Final = 64


def main() -> None:
    memory_bytes, seconds = int(sys.argv[1]), int(sys.argv[2])
    requests, answers = sys.stdin.buffer, _private_stdout()
    import pydicom.pixels.decoders  # noqa: F401 - half a second that no request should wait for

    _limit(memory_bytes)
    answers.write(READY)
    answers.flush()
    while head := requests.read(REQUEST.size):
        frame, length, *limits = REQUEST.unpack(head)
        data = requests.read(length)
        if len(data) < length:
            return
        _allow(seconds)
        _answer(answers, data, frame or None, Limits(*limits))


def request(data: bytes, frame: int | None, limits: Limits) -> bytes:
    """The head of a request."""
    return REQUEST.pack(frame or 0, len(data), *astuple(limits))


def _private_stdout() -> BinaryIO:
    """Standard output for the answers alone: whatever else prints in this process goes where errors go."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers


def _limit(memory_bytes: int) -> None:
    if sys.platform == "linux":  # others know the limit by name and refuse to set it
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES, _OPEN_FILES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a dump would hold a patient's image


def _allow(seconds: int) -> None:
    """Processor time for one more file; the kernel ends a worker that takes more, even with nobody left to watch."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + seconds + 1, hard))


def _answer(answers: BinaryIO, data: bytes, frame: int | None, limits: Limits) -> None:
    try:
        image = decode_dicom(data, frame, limits)
        _send_image(answers, image)
    except MemoryError:
        _refuse(answers, OUT_OF_MEMORY, "")
    except ImageTooLarge as error:
        _refuse(answers, OUT_OF_MEMORY if isinstance(error.__cause__, MemoryError) else TOO_LARGE, error.detail)
    except UnsupportedImage as error:
        _refuse(answers, UNSUPPORTED, error.detail)
    except InvalidImage as error:
        _refuse(answers, INVALID, error.detail)


def _send_image(answers: BinaryIO, image: DicomImage) -> None:
    height, width, channels = image.pixels.shape
    warned = sum(1 << WARNINGS.index(sentence) for sentence in image.warnings)
    answers.write(ANSWER.pack(IMAGE, 8 * image.pixels.itemsize, height, width, channels, warned))
    answers.write(image.pixels.data)  # in the machine's byte order: both ends are the same machine
    answers.flush()


def _refuse(answers: BinaryIO, status: int, sentence: str) -> None:
    text = sentence.encode()
    answers.write(ANSWER.pack(status, 0, len(text), 0, 0, 0) + text)
    answers.flush()


if __name__ == "__main__":
    main()
