"""What only the SQLite file promises: processes share it, full disks and locks are told, commits reach the disk."""

import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from medloop.errors import StorageFull, StorageUnavailable
from medloop.storage.sqlite import SqliteRecords

ADD = """
import sys
from pathlib import Path
from medloop.storage.sqlite import SqliteRecords

records = SqliteRecords(Path(sys.argv[1]))
won = records.put_once("audit", "first", {"actor": sys.argv[2]})
for _ in range(100):
    while True:
        record = records.get("audit", "count")
        if record is None:
            if records.put_once("audit", "count", {"n": 1}):
                break
        elif records.compare_and_set("audit", "count", record.revision, {"n": record.document["n"] + 1}):
            break
records.close()
print("won" if won else "lost")
"""


def test_processes_share_the_file(tmp_path: Path) -> None:
    path = tmp_path / "records.sqlite"
    running = [
        subprocess.Popen([sys.executable, "-c", ADD, str(path), str(i)], stdout=subprocess.PIPE, text=True)
        for i in range(3)
    ]
    outputs = [process.communicate(timeout=60)[0].strip() for process in running]
    assert sorted(outputs) == ["lost", "lost", "won"]
    records = SqliteRecords(path)
    record = records.get("audit", "count")
    records.close()
    assert record is not None
    assert (record.document, record.revision) == ({"n": 300}, 300)


class TinyRecords(SqliteRecords):
    """A file that may not grow much beyond its tables: SQLite then says what it says on a full disk."""

    def _connect(self) -> sqlite3.Connection:
        connection = super()._connect()
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages + 5}")
        return connection


def test_a_full_disk_is_told_and_loses_nothing(tmp_path: Path) -> None:
    records = TinyRecords(tmp_path / "records.sqlite")
    acknowledged = []

    def fill() -> None:
        for i in range(100):
            if records.put_once("audit", f"{i:03d}", {"text": "x" * 2000}):
                acknowledged.append(f"{i:03d}")

    with pytest.raises(StorageFull, match="free some space"):
        fill()
    assert acknowledged
    assert [record.id for record in records.find("audit", newest_first=False).items] == acknowledged
    records.close()


def test_a_batch_that_a_full_disk_breaks_leaves_nothing(tmp_path: Path) -> None:
    records = TinyRecords(tmp_path / "records.sqlite")
    assert records.put_many("audit", [("small", {})]) == 1
    with pytest.raises(StorageFull):
        records.put_many("audit", [(f"{i:03d}", {"text": "x" * 2000}) for i in range(100)])
    assert [record.id for record in records.find("audit").items] == ["small"]
    assert records.put_many("audit", [("small", {}), ("other", {})]) == 1  # the failed transaction is over
    records.close()


def test_a_lock_that_stays_is_told(tmp_path: Path) -> None:
    path = tmp_path / "records.sqlite"
    records = SqliteRecords(path, busy_s=0.1)
    records.put_once("audit", "1", {})
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageUnavailable, match="locked"):
        records.put_once("audit", "2", {})
    assert records.get("audit", "1") is not None  # reading goes on
    other.execute("ROLLBACK")
    other.close()
    assert records.put_once("audit", "2", {})
    records.close()


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "records.sqlite"
    path.write_bytes(b"something else entirely" * 100)
    records = SqliteRecords(path)
    with pytest.raises(StorageUnavailable, match="not a database"):
        records.ping()
    assert path.read_bytes().startswith(b"something else")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageUnavailable):
        SqliteRecords(tmp_path / "file" / "records.sqlite").ping()
    with pytest.raises(StorageUnavailable):
        SqliteRecords(tmp_path).ping()


def test_keeps_records_between_openings(tmp_path: Path) -> None:
    path = tmp_path / "new" / "records.sqlite"
    records = SqliteRecords(path)
    records.put_once("audit", "1", {"type": "x"})
    records.close()
    again = SqliteRecords(path)
    assert again.count_by("audit", "type") == {"x": 1}
    again.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_commits_wait_for_the_disk_and_reads_use_the_indexes(tmp_path: Path) -> None:
    records = SqliteRecords(tmp_path / "records.sqlite")
    records.ping()
    connection = records._connection
    assert connection is not None
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    statements: list[str] = []
    connection.set_trace_callback(statements.append)
    records.find("predictions", {"model": "m"}, cursor="x")
    connection.set_trace_callback(None)
    plan = " ".join(row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statements[0]}"))
    assert "USING INDEX predictions_by_model" in plan
    assert "TEMP B-TREE" not in plan  # the index gives the order too
    records.close()


ELSEWHERE = """
import sys
from pathlib import Path
from medloop.storage.sqlite import SqliteRecords

records = SqliteRecords(Path(sys.argv[1]))
records.put_once("audit", sys.argv[2], {"actor": "elsewhere"})
print(*sorted(record.id for record in records.find("audit").items))
records.close()
"""


def test_what_two_stores_of_one_process_write_outlives_another_process_that_ends(tmp_path: Path) -> None:
    path = tmp_path / "records.sqlite"
    first, second = SqliteRecords(path), SqliteRecords(path)
    assert first.put_once("audit", "a", {"actor": "here"})
    assert second.put_once("audit", "b", {"actor": "here"})

    def elsewhere(record_id: str) -> list[str]:
        command = [sys.executable, "-c", ELSEWHERE, str(path), record_id]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()

    assert elsewhere("c") == ["a", "b", "c"]
    assert first.get("audit", "c") is not None
    assert first.put_once("audit", "d", {"actor": "here"})
    assert elsewhere("e") == ["a", "b", "c", "d", "e"]
    first.close()
    second.close()
