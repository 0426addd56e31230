"""DICOM in a process of its own: the same pixels, and whatever a file does there stays there."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from medloop.data.sources.dicom import read_dicom
from medloop.errors import ImageTooLarge, InvalidImage, Overloaded, Unavailable, UnsupportedImage
from medloop.vision.decode import Limits
from medloop.vision.dicom import WARNINGS, decode_dicom
from medloop.vision.dicom_reader import DicomReader
from medloop.vision.prepare import PreparationSpec, prepare, prepare_pixels
from pydicom.uid import JPEGLosslessSV1

GREY = np.arange(64, dtype=np.uint16).reshape(8, 8) * 60
MakeDicom = Callable[..., bytes]


@pytest.fixture(scope="module")
def reader() -> Iterator[DicomReader]:
    """One for all tests here: what one does to it must not show in the next."""
    with DicomReader(seconds=60) as opened:
        yield opened


def workers() -> list[psutil.Process]:
    """The workers of all readers of this process that are still there."""
    children = psutil.Process().children()
    return [child for child in children if any("dicom_worker" in argument for argument in child.cmdline())]


def until_busy(reader: DicomReader) -> None:
    deadline = time.monotonic() + 30
    while not reader._busy:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def reads_well(reader: DicomReader, make_dicom: MakeDicom) -> bool:
    return np.array_equal(reader.read(make_dicom()).pixels[..., 0], GREY)


def test_training_and_serving_see_the_same_pixels(reader: DicomReader, dicom_samples: dict[str, bytes]) -> None:
    specs = [PreparationSpec(mode="L", size=8), PreparationSpec(mode="RGB", size=16, fit="letterbox", window=(0, 3000))]
    for name, data in dicom_samples.items():
        if name.startswith("frames"):
            for frame in (1, 2, 3):
                served, direct = reader.read(data, frame).pixels, decode_dicom(data, frame).pixels
                np.testing.assert_array_equal(served, direct, name)
            continue
        served, direct = reader.read(data).pixels, decode_dicom(data).pixels
        assert (served.dtype, served.shape) == (direct.dtype, direct.shape), name
        np.testing.assert_array_equal(served, direct, name)
        stored, _ = read_dicom(data)  # how a data set keeps it
        for spec in specs:
            np.testing.assert_array_equal(prepare_pixels(served, spec), prepare(stored, spec), name)


def test_warnings_and_refusals_come_through(reader: DicomReader, make_dicom: MakeDicom) -> None:
    warned = reader.read(make_dicom(BurnedInAnnotation="YES", RecognizableVisualFeatures="YES"))
    assert warned.warnings == (WARNINGS[0], WARNINGS[2])
    before = [worker.pid for worker in workers()]
    refusals: list[tuple[bytes, type[InvalidImage], str]] = [
        (make_dicom()[:-20], InvalidImage, "truncated"),
        (make_dicom(syntax=JPEGLosslessSV1), UnsupportedImage, "JPEG Lossless"),
        (make_dicom(Rows=65_535, Columns=65_535), ImageTooLarge, "65,535×65,535"),
    ]
    for data, error, message in refusals:
        with pytest.raises(InvalidImage, match=message) as caught:
            reader.read(data)
        assert type(caught.value) is error
    assert [worker.pid for worker in workers()] == before


def test_limits_are_the_readers(make_dicom: MakeDicom) -> None:
    with DicomReader(limits=Limits(max_bytes=2_000, max_side=7)) as reader:
        with pytest.raises(ImageTooLarge, match="more than the 2,000 allowed"):
            reader.read(bytes(2_001))
        assert not reader._idle
        with pytest.raises(ImageTooLarge, match="7 a side"):
            reader.read(make_dicom())


def test_twenty_threads_each_get_their_own(make_dicom: MakeDicom) -> None:
    files = [make_dicom(GREY + number) for number in range(60)]
    with DicomReader(workers=2, wait_seconds=60) as reader, ThreadPoolExecutor(20) as threads:
        for number, image in enumerate(threads.map(reader.read, files)):
            np.testing.assert_array_equal(image.pixels[..., 0], GREY + number)
        assert len(workers()) >= 2


def test_a_file_that_takes_too_long(make_dicom: MakeDicom, slow_dicom: bytes) -> None:
    with DicomReader(seconds=1) as reader:
        assert reads_well(reader, make_dicom)
        for _ in range(2):
            with pytest.raises(InvalidImage, match="took more than 1 seconds"):
                reader.read(slow_dicom)
        assert not reader._idle
    with DicomReader(seconds=30) as reader:
        assert reads_well(reader, make_dicom)


def test_a_file_that_takes_too_much_memory(make_dicom: MakeDicom) -> None:
    large = make_dicom(np.zeros((4_000, 4_000), np.uint16))
    with DicomReader(memory_bytes=230 * 2**20, seconds=30) as reader:
        assert reads_well(reader, make_dicom)
        with pytest.raises(ImageTooLarge, match="more memory"):
            reader.read(large)
        assert not reader._idle
        assert reads_well(reader, make_dicom)


def test_a_worker_killed_while_reading_fails_that_file_alone(make_dicom: MakeDicom, slow_dicom: bytes) -> None:
    with DicomReader(seconds=30) as reader, ThreadPoolExecutor(1) as threads:
        assert reads_well(reader, make_dicom)
        (pid,) = [worker._process.pid for worker in reader._idle]
        running = threads.submit(reader.read, slow_dicom)
        until_busy(reader)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(InvalidImage, match="made its decoder stop"):
            running.result(timeout=30)
        assert reads_well(reader, make_dicom)
        (fresh,) = reader._idle
        assert fresh._process.pid != pid
        os.kill(fresh._process.pid, signal.SIGKILL)  # between two files: nobody's fault, and nobody notices
        fresh._process.wait()
        assert reads_well(reader, make_dicom)


def test_nobody_waits_for_long(make_dicom: MakeDicom, slow_dicom: bytes) -> None:
    with ThreadPoolExecutor(1) as threads, DicomReader(seconds=30, wait_seconds=0.2) as reader:
        assert reads_well(reader, make_dicom)
        running = threads.submit(reader.read, slow_dicom)
        until_busy(reader)
        with pytest.raises(Overloaded):
            reader.read(make_dicom())
        assert not running.done()


def test_a_frame_that_no_file_has_costs_no_worker(reader: DicomReader, make_dicom: MakeDicom) -> None:
    assert reads_well(reader, make_dicom)
    before = [worker.pid for worker in workers()]
    for frame in (2**31 - 1, 2**31, 2**32, 2**40, 0, -1):
        with pytest.raises(InvalidImage, match=f"has (no|a) frame {frame}:"):
            reader.read(make_dicom(), frame)
    assert reads_well(reader, make_dicom)
    assert [worker.pid for worker in workers()] == before


def test_closing_ends_what_is_running(make_dicom: MakeDicom, slow_dicom: bytes) -> None:
    reader = DicomReader(seconds=30)
    assert reads_well(reader, make_dicom)
    mine = reader._idle[0]._process
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(reader.read, slow_dicom)
        until_busy(reader)
        reader.close()
        assert isinstance(running.exception(timeout=20), Unavailable)
    assert mine.poll() is not None
    with pytest.raises(Unavailable, match="stopping"):
        reader.read(make_dicom())


def test_a_worker_knows_no_secret_and_keeps_to_its_limits(
    make_dicom: MakeDicom, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    with DicomReader(memory_bytes=2**29) as reader:
        reader.read(make_dicom())
        process = psutil.Process(reader._idle[0]._process.pid)
        assert "AWS_SECRET_ACCESS_KEY" not in process.environ()
        assert process.rlimit(psutil.RLIMIT_AS) == (2**29, 2**29)
        assert process.rlimit(psutil.RLIMIT_CORE) == (0, 0)
        assert process.rlimit(psutil.RLIMIT_NOFILE)[1] <= 64
        assert process.rlimit(psutil.RLIMIT_CPU)[0] < 30
        assert os.getpgid(process.pid) != os.getpgid(0)


def test_workers_end_with_their_parent() -> None:
    """Even when the parent has no time to say so."""
    program = """if True:
        import os, signal
        from medloop.errors import InvalidImage
        from medloop.vision.dicom_reader import DicomReader
        reader = DicomReader()
        try:
            reader.read(bytes(128) + b"DICM")
        except InvalidImage:
            print(reader._idle[0]._process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False, text=True)
    assert result.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while psutil.pid_exists(int(result.stdout)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(int(result.stdout)) or psutil.Process(int(result.stdout)).status() == "zombie"


READY = "import os, sys, time; out = os.fdopen(1, 'wb', 0); out.write(b'\\x06'); "
HEAD = "sys.stdin.buffer.read(36); "


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("raise SystemExit(3)", Unavailable),
        ("print('hello')", Unavailable),
        (READY + "time.sleep(60)", InvalidImage),
        (READY + HEAD + "os.close(1); time.sleep(60)", InvalidImage),
        (READY + HEAD + "out.write(b'\\xff' * 1_000_000)", InvalidImage),
        (READY + HEAD + "out.write(bytes([0, 8]) + b'\\xff' * 8 + bytes([1, 0])); time.sleep(60)", InvalidImage),
        (READY + HEAD + "out.write(bytes([0, 8, 0, 0, 0, 9, 0, 0, 0, 9, 1, 0, 7])); time.sleep(60)", InvalidImage),
        (READY + HEAD + "out.write(bytes([1, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0]) + b'x' * 10_000)", InvalidImage),
    ],
    ids=[
        "no start",
        "no ready",
        "silence",
        "no output",
        "noise",
        "size of the moon",
        "stops inside",
        "endless sentence",
    ],
)
def test_a_worker_that_has_been_taken_over_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_dicom: MakeDicom, program: str, error: type[Exception]
) -> None:
    (tmp_path / "taken_over.py").write_text("import sys\n" + program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started = time.monotonic()
    with DicomReader(seconds=0.7, module="taken_over") as reader, pytest.raises(error):
        reader.read(make_dicom())
    assert time.monotonic() - started < 10
