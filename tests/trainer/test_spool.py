import os
from errno import ENOSPC
from pathlib import Path

import pytest
from medloop.errors import Conflict
from medloop_trainer.spool import IN_MEMORY, Entry, Spool


def entry(step: int) -> Entry:
    return Entry(at=0, step=step, metrics={"loss": float("nan") if step == 1 else 1.5})


def drained(spool: Spool) -> list[int]:
    steps = []
    while (batch := spool.take()) is not None:
        steps += [found.step for found in batch.entries]
        spool.acknowledge(batch)
    return steps


def test_entries_come_out_as_they_went_in_until_they_are_acknowledged(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "run.jsonl")
    everything = Entry(at=1, params={"a": "ä\n"}, tags={"b": ""}, status="KILLED")
    spool.append(everything)
    first, batch = spool.take(), spool.take()
    assert first is not None
    assert batch is not None
    assert first.entries == batch.entries == [everything]
    spool.append(entry(2))  # while the first is under way
    spool.acknowledge(batch)
    assert drained(spool) == [2]
    assert not spool.pending
    spool.append(entry(3))
    assert drained(spool) == [3]
    spool.close()
    assert not spool.path.exists()


def test_more_than_a_batch_keeps_its_order_over_restarts(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "run.jsonl")
    for step in range(500):
        spool.append(entry(step))
    first = spool.take()
    assert first is not None
    assert len(first.entries) < 500
    spool.acknowledge(first)
    spool.close()
    again = Spool(spool.path)
    again.claim()
    assert sorted(set(drained(again))) == list(range(500)), "again rather than never"
    again.close()


def test_a_file_has_one_holder(tmp_path: Path) -> None:
    spool, other = Spool(tmp_path / "run.jsonl"), Spool(tmp_path / "run.jsonl")
    spool.claim()
    with pytest.raises(Conflict, match="Another process is at work on the run run"):
        other.claim()
    spool.close()
    other.claim()
    other.close()


class Disk:
    """Takes so many bytes more, then is full."""

    def __init__(self, file: Path) -> None:
        self.file, self.room = file, 10**6

    def write(self, descriptor: int, data: bytes) -> int:
        if not self.room:
            raise OSError(ENOSPC, os.strerror(ENOSPC))
        taken = os.write(descriptor, data[: self.room])
        self.room -= taken
        return taken


def test_a_full_disk_costs_at_most_the_oldest_of_very_many(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = Disk(tmp_path / "run.jsonl")
    spool = Spool(disk.file, write=disk.write)
    spool.append(entry(0))
    disk.room = 20  # half a line
    spool.append(entry(1))
    assert disk.file.read_bytes().count(b"\n") == 1
    assert caplog.text.count("No space left") == 1
    disk.room = 10**6
    assert drained(spool) == [0, 1]

    disk.room = 0
    for step in range(IN_MEMORY + 5):
        spool.append(Entry(at=0, step=step))
    assert spool.lost == 5
    assert caplog.text.count("No space left") == 2, "told once, not each time"
    assert drained(spool) == list(range(5, IN_MEMORY + 5)), "memory is delivered, too"
    spool.close()
    assert "entries lost that MLflow never received: 5" in caplog.text
