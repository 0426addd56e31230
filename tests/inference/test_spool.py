"""What the spool took is there after any end of the process, what it could not take is counted, and it never raises."""

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from medloop_inference.frames import join_frames
from medloop_inference.spool import Spool


def payloads(count: int, size: int = 50) -> list[bytes]:
    return [f"{i:06d}".encode().ljust(size, b".") for i in range(count)]


def drained(spool: Spool) -> list[bytes]:
    """Everything that waits, taken and discarded."""
    found: list[bytes] = []
    while (segment := spool.take()) is not None:
        found += segment.payloads
        spool.discard(segment)
    return found


def told(spool: Spool) -> str | None:
    """What it says now; asked anew each time."""
    return spool.problem


def segments(root: Path) -> list[Path]:
    return sorted(root.rglob("*.frames"))


def test_gives_what_it_was_given_in_order_and_leaves_nothing(tmp_path: Path) -> None:
    spool = Spool(tmp_path, segment_bytes=200)
    given = payloads(20)
    for start in range(0, 20, 2):
        assert spool.append(given[start : start + 2])
    assert spool.waiting == 20
    assert len(segments(tmp_path)) > 3
    first = spool.take()
    assert first is not None
    again = spool.take()
    assert again is not None
    assert again.payloads == first.payloads  # until it is discarded
    assert drained(spool) == given
    assert (spool.waiting, segments(tmp_path), spool.take()) == (0, [], None)
    spool.close()


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        spool = Spool(tmp_path / "spool")
        spool.append([b"x"])
        spool.refuse(b"y")
    finally:
        os.umask(mask)
    files = list((tmp_path / "spool" / "0").iterdir())
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert stat.S_IMODE((tmp_path / "spool" / "0").stat().st_mode) == 0o700
    spool.close()


def test_threads_append_while_another_takes(tmp_path: Path) -> None:
    spool = Spool(tmp_path, segment_bytes=500)
    given = payloads(2000)
    with ThreadPoolExecutor(4) as pool:
        kept = pool.map(lambda start: spool.append(given[start : start + 5]), range(0, 2000, 5))
        found = drained(spool)
    assert all(kept)
    found += drained(spool)
    assert sorted(found) == given
    spool.close()


def test_the_next_process_takes_over_what_is_left(tmp_path: Path) -> None:
    spool = Spool(tmp_path, segment_bytes=200)
    spool.append(payloads(9))
    segment = spool.take()  # taken, never discarded
    assert segment is not None
    spool.append([b"later"])
    spool.close()
    assert not spool.append([b"too late"])
    assert spool.dropped == 1
    spool.discard(segment)  # somebody else's by now
    following = Spool(tmp_path)
    following.append([b"new"])
    assert following.take() is not None
    assert following.waiting == 11
    assert drained(following) == [*payloads(9), b"later", b"new"]
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
    following.close()


APPEND = """
import sys
from pathlib import Path
from medloop_inference.spool import Spool

spool = Spool(Path(sys.argv[1]), segment_bytes=20_000)
number = 0
while True:
    run = [b"%08d" % (number + i) + bytes(number * 7919 % 50_000) for i in range(3)]
    if spool.append(run):
        number += 3
        sys.stdout.write(f"{number}\\n")
        sys.stdout.flush()
"""


def test_what_was_taken_before_a_kill_is_there_after_it(tmp_path: Path) -> None:
    for attempt in range(3):
        root = tmp_path / str(attempt)
        child = subprocess.Popen([sys.executable, "-c", APPEND, str(root)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        first = child.stdout.readline()
        time.sleep(0.03 * attempt)
        child.send_signal(signal.SIGKILL)
        reported = int((first + child.communicate()[0]).split("\n")[-2])  # the last whole line
        spool = Spool(root)
        found = [int(payload[:8]) for payload in drained(spool)]
        assert found[:reported] == list(range(reported))
        assert len(found) <= reported + 3  # one run may have been on its way
        assert (spool.damaged, spool.waiting) == (0, 0)
        spool.close()


def test_a_torn_end_is_cut_off_and_counted(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append(payloads(3))
    spool.close()
    (segment,) = segments(tmp_path)
    segment.write_bytes(segment.read_bytes()[:-1])
    following = Spool(tmp_path)
    assert drained(following) == payloads(2)
    assert (following.torn, following.damaged, following.waiting) == (1, 0, 0)
    assert segments(tmp_path) == []
    following.close()


def test_damage_is_kept_aside_and_costs_no_other_segment(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spool = Spool(tmp_path, segment_bytes=1)  # one segment for each append
    for start in range(0, 9, 3):
        spool.append(payloads(9)[start : start + 3])
    spool.close()
    middle = segments(tmp_path)[1]
    spoilt = bytearray(middle.read_bytes())
    spoilt[len(spoilt) // 2] ^= 1  # in the second of three
    middle.write_bytes(spoilt)
    following = Spool(tmp_path)
    assert drained(following) == [each for i, each in enumerate(payloads(9)) if i != 4]
    assert (following.damaged, following.waiting) == (1, 0)
    (aside,) = tmp_path.rglob("*.damaged")
    assert aside.read_bytes() == bytes(spoilt)
    assert len([record for record in caplog.records if "cannot be read" in record.message]) == 1
    following.close()
    assert drained(Spool(tmp_path)) == []


def test_damage_of_several_processes_is_kept_side_by_side_until_the_bound(tmp_path: Path) -> None:
    found: list[bytes] = []
    removed = 0
    for number in range(4):  # each begins to count at 1
        spool = Spool(tmp_path)
        spool.append([b"%d" % number * 100])
        spool.close()
        (segment,) = segments(tmp_path)
        found.append(segment.read_bytes()[:-1] + b"?")
        segment.write_bytes(found[-1])
        following = Spool(tmp_path, damaged_bytes=3 * len(found[0]))
        assert drained(following) == []
        removed += following.removed
        following.close()
    kept = sorted(tmp_path.rglob("*.damaged"))
    assert [path.read_bytes() for path in kept] == found[1:]
    assert removed == 1


def test_beyond_its_bound_it_drops_and_counts_until_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Spool(tmp_path, max_bytes=500)
    kept = [spool.append([payload]) for payload in payloads(10)]
    assert kept == [True] * 8 + [False] * 2  # 62 bytes each
    assert spool.dropped == 2
    assert "500 bytes" in (told(spool) or "")
    assert sum(path.stat().st_size for path in segments(tmp_path)) <= 500
    assert drained(spool) == payloads(8)
    assert not spool.append(payloads(9))  # all or none
    assert (spool.dropped, spool.waiting) == (11, 0)
    assert spool.append([b"again"])
    assert spool.dropped == 11
    assert told(spool) is None
    assert [each.message for each in caplog.records if "lost" in each.message] == [
        "spool: keeps predictions again; lost for good meanwhile: 11"
    ]
    assert spool.append([b"and again"])
    assert spool.size == len(join_frames([b"again", b"and again"]))
    assert drained(spool) == [b"again", b"and again"]
    assert spool.size == 0
    spool.close()


class FullDisk:
    """Takes `room` bytes, then fails as a full disk does."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __call__(self, descriptor: int, data: memoryview) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = os.write(descriptor, data[: self.room])
        self.room -= written
        return written


def test_a_full_disk_leaves_no_half_frame_behind(tmp_path: Path) -> None:
    disk = FullDisk(room=100)
    spool = Spool(tmp_path, write=disk)
    assert [spool.append([payload]) for payload in payloads(3)] == [True, False, False]
    assert "No space left" in (told(spool) or "")
    disk.room = 10**6
    assert spool.append([b"there is room again"])
    assert spool.dropped == 2
    assert told(spool) is None
    assert drained(spool) == [*payloads(1), b"there is room again"]
    assert (spool.torn, spool.damaged) == (0, 0)
    spool.close()


LIMITED = """
import resource, sys
from pathlib import Path
from medloop_inference.spool import Spool

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # longer files the kernel itself refuses
spool = Spool(Path(sys.argv[1]))
print(sum(spool.append([b"%04d" % i + bytes(88)]) for i in range(30)), spool.dropped, spool.problem is not None)
"""


def test_a_file_that_the_kernel_does_not_let_grow(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True)
    kept, dropped, problem = done.stdout.split()
    assert (int(kept), int(dropped), problem) == (9, 21, "True")  # 104 bytes each
    spool = Spool(tmp_path)
    assert [int(payload[:4]) for payload in drained(spool)] == list(range(9))
    assert (spool.torn, spool.damaged) == (0, 0)
    spool.close()


def test_a_folder_that_cannot_be_made_is_told_and_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "spool"
    root.write_text("a file in the way")
    spool = Spool(root)
    assert not spool.append([b"lost"])
    assert spool.take() is None
    assert spool.adopt() == 0
    assert told(spool) is not None
    root.unlink()
    assert spool.append([b"kept"])
    assert "lost for good meanwhile: 1" in caplog.text
    assert spool.dropped == 1
    assert told(spool) is None
    assert drained(spool) == [b"kept"]
    spool.close()


HOLD = """
import sys
from pathlib import Path
from medloop_inference.spool import Spool

spool = Spool(Path(sys.argv[1]))
print(spool.append([b"theirs"] * 3), flush=True)
sys.stdin.read()
"""


def test_processes_do_not_share_and_the_living_adopt_what_the_dead_left(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append([b"mine"])
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "True\n"
    assert len(segments(tmp_path / "1")) == 1
    assert spool.adopt() == 0  # it lives
    assert drained(spool) == [b"mine"]
    child.kill()
    child.communicate()
    assert spool.adopt() == 1
    assert spool.append([b"more"])
    assert sorted(drained(spool)) == [b"more"] + [b"theirs"] * 3
    assert (segments(tmp_path), spool.waiting) == ([], 0)
    spool.close()


def test_adopting_leaves_room_for_its_own(tmp_path: Path) -> None:
    other, spool = Spool(tmp_path, segment_bytes=1), Spool(tmp_path, max_bytes=400)
    for payload in payloads(10):
        other.append([payload])
    spool.append([b"mine"])
    other.close()
    assert spool.adopt() == 2  # 62 bytes each, and half of the bound is 200
    assert spool.append([b"more"])
    while spool.adopt() or spool.waiting:
        drained(spool)
    assert segments(tmp_path) == []
    spool.close()


def test_what_was_refused_is_kept_for_people(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append([b"x"])
    spool.refuse(b"one")
    spool.refuse(b"two")
    spool.close()
    assert (tmp_path / "0" / "refused").read_bytes() == join_frames([b"one", b"two"])
    assert spool.refused == 2


def test_syncing_does_not_mind_what_is_delivered_meanwhile(tmp_path: Path) -> None:
    spool = Spool(tmp_path, segment_bytes=100)
    spool.append(payloads(3))
    spool.append(payloads(1))
    spool.sync()
    for path in segments(tmp_path):
        path.unlink()
    spool.append(payloads(1))
    spool.sync()
    assert drained(spool) == []
    spool.close()
