"""Records in one SQLite file, which several processes of one machine may share.

The write-ahead log lets readers and a writer work side by side, and `synchronous=FULL` flushes it on every commit, so
a write that was acknowledged survives a power failure (SQLite's documentation, "Write-Ahead Logging"). It needs a
disk of this machine: no network file system.
"""

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from medloop.errors import StorageFull, StorageUnavailable
from medloop.storage.records import FIELDS, Page, Record, check_find, check_id, encode, page_of


class SqliteRecords:
    """`RecordStore` in the file `path`, made when it is first used; `busy_s` is how long to wait while another process
    writes. Threads share one connection and take turns."""

    def __init__(self, path: Path, *, busy_s: float = 5.0) -> None:
        self._path = path.absolute()
        self._busy_s = busy_s
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"SqliteRecords({self.url!r})"

    @property
    def url(self) -> str:
        return f"sqlite:///{self._path}"

    def put_once(self, kind: str, record_id: str, document: Mapping[str, Any]) -> bool:
        return self.put_many(kind, [(record_id, document)]) == 1

    def put_many(self, kind: str, items: Sequence[tuple[str, Mapping[str, Any]]]) -> int:
        check_find(kind, None)
        rows = [(check_id(record_id), encode(kind, document)[0]) for record_id, document in items]
        sql = f"INSERT INTO {kind} (id, revision, document) VALUES (?, 1, ?) ON CONFLICT (id) DO NOTHING"  # noqa: S608  the kind is a key of FIELDS
        with self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                new = connection.executemany(sql, rows).rowcount if rows else 0
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # SQLite itself rolls back after some errors, such as a full disk
                    connection.execute("ROLLBACK")
                raise
        return new

    def get(self, kind: str, record_id: str) -> Record | None:
        check_find(kind, None)
        rows, _ = self._run(f"SELECT id, revision, document FROM {kind} WHERE id = ?", (check_id(record_id),))  # noqa: S608  as above
        return _record(rows[0]) if rows else None

    def find(
        self,
        kind: str,
        where: Mapping[str, str | None] | None = None,
        *,
        limit: int = 100,
        cursor: str | None = None,
        newest_first: bool = True,
    ) -> Page:
        conditions, values = _conditions(kind, check_find(kind, where, limit, cursor))
        if cursor is not None:
            conditions.append("id < ?" if newest_first else "id > ?")
            values.append(cursor)
        order = "DESC" if newest_first else "ASC"
        sql = f"SELECT id, revision, document FROM {kind} WHERE {_all(conditions)} ORDER BY id {order} LIMIT ?"  # noqa: S608  as above
        rows, _ = self._run(sql, (*values, limit + 1))
        return page_of([_record(row) for row in rows], limit)

    def compare_and_set(self, kind: str, record_id: str, revision: int, document: Mapping[str, Any]) -> bool:
        text, _ = encode(kind, document)
        sql = f"UPDATE {kind} SET revision = revision + 1, document = ? WHERE id = ? AND revision = ?"  # noqa: S608  as above
        return self._run(sql, (text, check_id(record_id), revision))[1] == 1

    def count_by(self, kind: str, field: str, where: Mapping[str, str | None] | None = None) -> dict[str, int]:
        check_find(kind, {field: None})
        conditions, values = _conditions(kind, check_find(kind, where))
        value = _expression(kind, field)
        conditions.append(f"{value} IS NOT NULL")
        sql = f"SELECT {value}, COUNT(*) FROM {kind} WHERE {_all(conditions)} GROUP BY 1"  # noqa: S608  as above
        return dict(self._run(sql, values)[0])

    def ping(self) -> None:
        self._run("SELECT COUNT(*) FROM sqlite_schema", ())

    def close(self) -> None:
        with self._lock, self._translated():
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _run(self, sql: str, values: Sequence[Any]) -> tuple[list[Any], int]:
        """The rows that one statement gives, and how many it changed. Each statement is its own transaction."""
        with self._connected() as connection:
            cursor = connection.execute(sql, values)
            return cursor.fetchall(), cursor.rowcount

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """The connection, for this thread alone, and its errors translated."""
        with self._lock, self._translated():
            if self._connection is None:
                self._connection = self._connect()
            yield self._connection

    def _connect(self) -> sqlite3.Connection:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # SQLite itself would make it 0644. One that is there is opened by nothing but SQLite: closing it would drop the
        # locks of this process's other connections ("How To Corrupt An SQLite Database File", 2.2), and the next
        # process to end would delete the write-ahead log that they go on writing to.
        with suppress(FileExistsError):
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(self._path, timeout=self._busy_s, isolation_level=None, check_same_thread=False)
        try:
            _use_write_ahead_log(connection, self._busy_s)
            connection.execute("PRAGMA synchronous = FULL")
            connection.executescript(f"BEGIN IMMEDIATE; {_schema()} COMMIT;")
        except BaseException:
            connection.close()
            raise
        return connection

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            if exc.sqlite_errorcode in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE):
                raise StorageFull(f"The disk under {self.url} is full; free some space and try again.") from exc
            raise StorageUnavailable(f"The records at {self.url} cannot be used ({exc}); try again.") from exc
        except OSError as exc:
            reason = exc.strerror or type(exc).__name__
            raise StorageUnavailable(f"The records at {self.url} cannot be used ({reason}); check the folder.") from exc


def _use_write_ahead_log(connection: sqlite3.Connection, busy_s: float) -> None:
    """Switch the file's journal. While two processes do so at once SQLite answers "locked" without waiting."""
    deadline = time.monotonic() + busy_s
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


def _schema() -> str:
    """A table a kind, and an index for each declared field that also gives the order of ids."""
    statements = []
    for kind, fields in FIELDS.items():
        statements.append(
            f"CREATE TABLE IF NOT EXISTS {kind} "
            "(id TEXT NOT NULL PRIMARY KEY, revision INTEGER NOT NULL, document TEXT NOT NULL);"
        )
        statements += [
            f"CREATE INDEX IF NOT EXISTS {kind}_by_{field} ON {kind} ({_expression(kind, field)}, id);"
            for field in fields
        ]
    return "\n".join(statements)


def _expression(kind: str, field: str) -> str:
    """The SQL value of a declared field; an index serves it only when both are written alike."""
    return f"json_extract(document, '$.{FIELDS[kind][field]}')"


def _conditions(kind: str, where: Mapping[str, str | None]) -> tuple[list[str], list[Any]]:
    # IS rather than =, so that null equals null; SQLite uses an index for either.
    return [f"{_expression(kind, field)} IS ?" for field in where], list(where.values())


def _all(conditions: Sequence[str]) -> str:
    return " AND ".join(conditions) or "TRUE"


def _record(row: tuple[str, int, str]) -> Record:
    return Record(row[0], row[1], json.loads(row[2]))
