"""DICOM of strangers, decoded in processes of their own with limits on memory and time.

A parser and half a dozen codecs in C see bytes that anybody may have made. Here the worst that such a file can do is to
end a worker: the next file gets a fresh one, and no other request notices. What a worker writes is not trusted either.
"""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Final

import numpy as np

from medloop.errors import ImageTooLarge, InvalidImage, Overloaded, Unavailable, UnsupportedImage
from medloop.vision import dicom_worker as wire
from medloop.vision.decode import DEFAULT_LIMITS, Limits, Pixels
from medloop.vision.dicom import NEEDS_PYDICOM, WARNINGS, DicomImage, has_pydicom

_START_SECONDS: Final = 60.0  # usually one; a machine that starts everything at once is slow
_LAST_SECONDS: Final = 1.0  # that a process may take to be gone after it has closed its output
_MAX_SENTENCE: Final = 1_000  # bytes
_MAX_FRAMES: Final = 2**31 - 1  # the largest number that NumberOfFrames can be (PS3.5 §6.2, IS)

_REFUSALS: Final = {
    wire.INVALID: InvalidImage,
    wire.UNSUPPORTED: UnsupportedImage,
    wire.TOO_LARGE: ImageTooLarge,
}

# All that a worker needs from its environment: none of the service's secrets.
_INHERITED: Final = ("PYTHONPATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PATH")
# Threads and arenas that a codec has no use for would only take addresses, which the memory limit counts.
_ADDED: Final = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}


class _Broken(Exception):
    """The worker cannot be used any more."""


class _TimedOut(_Broken):
    pass


class DicomReader:
    """Decodes DICOM as `medloop.vision.dicom.decode_dicom` does, to the bit, in up to `workers` processes.

    Args:
        workers: how many files are decoded at once; processes start when they are first needed.
        memory_bytes: address space of a worker, of which Python and its libraries take about a third of a GiB.
        seconds: how long one file may take, on the clock and of processor time.
        wait_seconds: how long to wait for a worker while all are busy.
        limits: as for any image.
        module: what runs as worker; another one only where tests need one that misbehaves.

    Thread-safe; use as a context manager, or call `close`.
    """

    def __init__(
        self,
        workers: int = 1,
        memory_bytes: int = 2**30,
        seconds: float = 10.0,
        wait_seconds: float = 1.0,
        limits: Limits = DEFAULT_LIMITS,
        module: str = wire.__name__,
    ) -> None:
        self._seconds, self._wait_seconds, self._limits = seconds, wait_seconds, limits
        self._arguments = (module, str(memory_bytes), str(max(1, round(seconds))))
        self._slots = threading.BoundedSemaphore(workers)
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._closed = False

    def __enter__(self) -> "DicomReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, data: bytes, frame: int | None = None) -> DicomImage:
        """The pixels of a DICOM file, or of its frame `frame` (from 1 on).

        Raises:
            InvalidImage, UnsupportedImage, ImageTooLarge: as `decode_dicom`; InvalidImage also where decoding took too
                long or ended its process, ImageTooLarge where it took too much memory.
            Overloaded: no worker became free in `wait_seconds`.
            Unavailable: no worker could be started, or the reader is closed.
        """
        if not has_pydicom():
            raise UnsupportedImage(NEEDS_PYDICOM)
        if frame is not None and not 1 <= frame <= _MAX_FRAMES:
            raise InvalidImage(f"No DICOM file has a frame {frame}: choose one from 1 on.")
        if len(data) > self._limits.max_bytes:
            raise ImageTooLarge(
                f"The DICOM file has {len(data):,} bytes, more than the {self._limits.max_bytes:,} allowed: "
                "send a smaller one."
            )
        with self._worker() as worker:
            try:
                return worker.read(data, frame, self._limits, time.monotonic() + self._seconds)
            except _TimedOut as exc:
                raise InvalidImage(
                    f"This DICOM file took more than {self._seconds:g} seconds to decode: convert it to an "
                    "uncompressed DICOM transfer syntax."
                ) from exc
            except _Broken as exc:
                if self._closed:
                    raise _closed() from exc
                raise InvalidImage("This DICOM file made its decoder stop: export it again.") from exc

    def close(self) -> None:
        """End all workers; whatever they were reading fails with `Unavailable`."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for worker in self._busy:
                worker.kill()  # whoever waits for it will discard it
        for worker in idle:
            worker.discard()

    @contextmanager
    def _worker(self) -> Iterator["_Worker"]:
        if not self._slots.acquire(timeout=self._wait_seconds):
            raise Overloaded("Too many DICOM files are being read: try again soon.")
        try:
            worker = self._taken()
            try:
                yield worker
            finally:
                self._put_back(worker)
        finally:
            self._slots.release()

    def _taken(self) -> "_Worker":
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        if worker is None or not worker.alive:
            if worker is not None:
                worker.discard()
            worker = _Worker(self._arguments)
        with self._lock:
            if not self._closed:
                self._busy.add(worker)
                return worker
        worker.discard()
        raise _closed()

    def _put_back(self, worker: "_Worker") -> None:
        with self._lock:
            self._busy.discard(worker)
            reusable = worker.usable and not self._closed
            if reusable:
                self._idle.append(worker)
        if not reusable:
            worker.discard()


class _Worker:
    """One process, used by one thread at a time. `usable` turns false when it must not get another file."""

    def __init__(self, arguments: tuple[str, ...]) -> None:
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ} | _ADDED
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter, our own module
                [sys.executable, "-P", "-m", *arguments],  # -P: nothing is imported from the working directory
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # what libraries print may quote headers
                env=environment,
                bufsize=0,
                process_group=0,  # Ctrl-C is for the service, which lets accepted requests finish
            )
        except OSError as exc:
            raise Unavailable("No process could be started to decode DICOM: try again soon.") from exc
        self.usable = True
        self._input, self._output = _descriptor(self._process.stdin), _descriptor(self._process.stdout)
        os.set_blocking(self._input, False)
        try:
            if self._receive(1, time.monotonic() + _START_SECONDS) != wire.READY:
                raise _Broken
        except _Broken as exc:
            self.discard()
            command = f"python -m {' '.join(arguments)}"
            raise Unavailable(f"The DICOM decoder does not start: an operator sees why with `{command}`.") from exc

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def read(self, data: bytes, frame: int | None, limits: Limits, deadline: float) -> DicomImage:
        request = wire.request(data, frame, limits)
        self.usable = False  # until a whole answer has been understood
        self._send(request, deadline)
        self._send(data, deadline)
        answer = wire.ANSWER.unpack(self._receive(wire.ANSWER.size, deadline))
        status, bits, height, width, channels, warned = answer
        if status == wire.IMAGE:
            pixels = self._pixels(bits, (height, width, channels), limits, deadline)
            self.usable = True
            return DicomImage(pixels, tuple(text for bit, text in enumerate(WARNINGS) if warned >> bit & 1))
        if status == wire.OUT_OF_MEMORY:
            raise ImageTooLarge("This DICOM file takes more memory to decode than is allowed: send a smaller image.")
        if height > _MAX_SENTENCE or status not in _REFUSALS:
            raise _Broken
        sentence = self._receive(height, deadline).decode(errors="replace")
        self.usable = True
        raise _REFUSALS[status](sentence)

    def kill(self) -> None:
        """End the process, whatever it does; for any thread."""
        self._process.kill()

    def discard(self) -> None:
        """End the process and close its pipes; for the thread that uses it, and once."""
        self.usable = False
        with self._process:  # closes and waits
            self.kill()

    def _pixels(self, bits: int, shape: tuple[int, int, int], limits: Limits, deadline: float) -> Pixels:
        height, width, channels = shape
        fits = 0 < height <= limits.max_side and 0 < width <= limits.max_side and height * width <= limits.max_pixels
        if not fits or (bits, channels) not in ((8, 1), (8, 3), (16, 1)):
            raise _Broken
        received = self._receive(height * width * channels * bits // 8, deadline)
        return (
            np.frombuffer(received, np.uint8).reshape(shape)
            if bits == 8
            else (np.frombuffer(received, np.uint16).reshape(shape))
        )

    def _send(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            _wait(self._input, select.POLLOUT, deadline)
            try:
                view = view[os.write(self._input, view) :]
            except OSError as exc:  # it has ended; POLLOUT promised that writing does not block
                raise _Broken from exc

    def _receive(self, size: int, deadline: float) -> bytearray:
        received = bytearray(size)
        view = memoryview(received)
        while view:
            _wait(self._output, select.POLLIN, deadline)
            count = os.readv(self._output, [view])
            if count == 0:
                raise self._ended()
            view = view[count:]
        return received

    def _ended(self) -> _Broken:
        """Why there is no more output. The kernel's watch over processor time may be ahead of ours over the clock."""
        try:
            status = self._process.wait(_LAST_SECONDS)
        except subprocess.TimeoutExpired:
            return _Broken()
        return _TimedOut() if status == -signal.SIGXCPU else _Broken()


def _descriptor(pipe: IO[bytes] | None) -> int:
    if pipe is None:
        raise ValueError("the process was started without pipes")
    return pipe.fileno()


def _wait(descriptor: int, event: int, deadline: float) -> None:
    """Until a pipe can be used, or `deadline` (monotonic, s)."""
    poller = select.poll()  # select() knows no descriptors beyond 1,023, and a server has more
    poller.register(descriptor, event)
    left = deadline - time.monotonic()
    if left <= 0 or not poller.poll(left * 1000):
        raise _TimedOut


def _closed() -> Unavailable:
    return Unavailable("The service is stopping: send the file again in a moment.")
