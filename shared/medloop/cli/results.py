"""Tables of predictions: Parquet, CSV or NDJSON by the file's ending, and the journal that they grow from.

In Parquet and CSV each class has a column `p_<class>`; lists are lists in Parquet, and JSON in CSV.
"""

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Literal, Protocol, Self

from medloop.errors import InvalidRequest
from medloop.schemas import ModelRef
from medloop.storage.disk import disk_errors

_PROBABILITY: Final = "p_"
_LISTS: Final = ("prediction_set", "reasons")
_FIGURES: Final = ("outlier_score", "outlier_percentile")
_ROWS_AT_ONCE: Final = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What is known of one file: `answered`, `refused` by the service, or `skipped` since it is no image."""

    file: str
    status: Literal["answered", "refused", "skipped"]
    sha256: str | None = None
    label: str | None = None
    probabilities: dict[str, float] | None = None
    prediction_set: list[str] | None = None
    decision: str | None = None
    reasons: list[str] | None = None
    outlier_score: float | None = None
    outlier_percentile: float | None = None
    model: str | None = None
    version: str | None = None
    prediction_id: str | None = None
    error_code: str | None = None
    error: str | None = None


_FIELDS: Final = tuple(field.name for field in fields(Row))


class Journal:
    """Rows in the order in which they came, as NDJSON beside `out`, and how far they are known.

    Opened, it holds what an earlier run left, or else what `out` says. Of a file with several rows the last one counts;
    a last line that was cut off counts for nothing. Raises InvalidRequest for an ending that names no format.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.absolute().with_name(f"{out.name}.partial.ndjson")
        self._format = _format_of(out)
        self._file: IO[bytes] | None = None
        self._offsets: dict[str, int] = {}
        self._answered: dict[str, tuple[str | None, str | None, str | None]] = {}

    def __enter__(self) -> Self:
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            known = list(self._format.read(self.out)) if self.out.exists() and not self.path.exists() else []
            self._file = self.path.open("a+b")
            self._recover()
        self.add(known)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _recover(self) -> None:
        file = self._opened
        file.seek(0)
        end = 0
        for line in file:
            try:
                row = Row(**json.loads(line))
            except (ValueError, TypeError):
                break  # written when the machine or the process stopped; what follows it was never finished
            self._note(row, end)
            end += len(line)
        file.truncate(end)
        file.seek(end)

    @property
    def _opened(self) -> IO[bytes]:
        if self._file is None:
            raise ValueError("the journal is not open")
        return self._file

    def knows(self, file: str, sha256: str, model: ModelRef) -> bool:
        """Whether `file` with this content was answered by this version."""
        return self._answered.get(file) == (sha256, model.name, model.version)

    def add(self, rows: Sequence[Row]) -> None:
        file = self._opened
        with disk_errors(self.path):
            for row in rows:
                self._note(row, file.tell())
                file.write(json.dumps(asdict(row)).encode() + b"\n")
            file.flush()

    def _note(self, row: Row, offset: int) -> None:
        self._offsets[row.file] = offset
        if row.status == "answered":
            self._answered[row.file] = (row.sha256, row.model, row.version)

    def finish(self, files: Sequence[str], classes: Sequence[str], count: Callable[[Row], None]) -> None:
        """Write the rows of `files`, in their order, to `out`, whole or not at all; `count` sees each. Then the journal
        goes."""

        def rows() -> Iterator[Row]:
            with self.path.open("rb") as journal:
                for name in files:
                    journal.seek(self._offsets[name])
                    row = Row(**json.loads(journal.readline()))
                    count(row)
                    yield row

        part = self.path.with_name(f".{self.out.name}.part")
        with disk_errors(self.out):
            try:
                self._format.write(part, rows(), classes)
                part.replace(self.out)
            finally:
                part.unlink(missing_ok=True)
            self.path.unlink()


class _Format(Protocol):
    def read(self, path: Path) -> Iterator[Row]: ...
    def write(self, path: Path, rows: Iterator[Row], classes: Sequence[str]) -> None: ...


class _Ndjson:
    def read(self, path: Path) -> Iterator[Row]:
        with path.open("rb") as file:
            for line in file:
                yield _row_of(json.loads(line), path)

    def write(self, path: Path, rows: Iterator[Row], classes: Sequence[str]) -> None:
        with path.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
            _sync(file)


class _Csv:
    def read(self, path: Path) -> Iterator[Row]:
        with path.open(newline="", encoding="utf-8") as file:
            for record in csv.DictReader(file):
                values: dict[str, Any] = {name: value or None for name, value in record.items()}
                for name in _LISTS:
                    values[name] = json.loads(values[name]) if values.get(name) else None
                for name in (*_FIGURES, *(name for name in values if name.startswith(_PROBABILITY))):
                    values[name] = float(values[name]) if values.get(name) else None
                yield _row_of(values, path)

    def write(self, path: Path, rows: Iterator[Row], classes: Sequence[str]) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, _columns(classes), extrasaction="ignore")
            table.writeheader()
            for row in rows:
                lists = {name: json.dumps(value) for name in _LISTS if (value := getattr(row, name)) is not None}
                table.writerow(_flat(row) | lists)
            _sync(file)


class _Parquet:
    def __init__(self) -> None:
        try:
            import pyarrow.parquet  # noqa: F401 - only to tell at once; half a second of every other command else
        except ImportError as exc:
            raise InvalidRequest(
                "Parquet needs pyarrow: install it with pip install 'medloop[data]', or name a .csv or .ndjson file."
            ) from exc

    def read(self, path: Path) -> Iterator[Row]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                for values in batch.to_pylist():
                    yield _row_of(values, path)

    def write(self, path: Path, rows: Iterator[Row], classes: Sequence[str]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = _columns(classes)
        numbers = {*_FIGURES, *(name for name in columns if name.startswith(_PROBABILITY))}
        schema = pa.schema(
            (name, pa.float64() if name in numbers else pa.list_(pa.string()) if name in _LISTS else pa.string())
            for name in columns
        )
        with pq.ParquetWriter(path, schema) as file:
            while chunk := [_flat(row) for row in islice(rows, _ROWS_AT_ONCE)]:
                file.write_table(pa.Table.from_pylist(chunk, schema))


_FORMATS: Final[dict[str, Callable[[], _Format]]] = {".parquet": _Parquet, ".csv": _Csv, ".ndjson": _Ndjson}


def _format_of(out: Path) -> _Format:
    if (form := _FORMATS.get(out.suffix.lower())) is None:
        raise InvalidRequest(f"{out.name} must end in {', '.join(_FORMATS)}.")
    return form()


def _columns(classes: Sequence[str]) -> list[str]:
    at = _FIELDS.index("probabilities")
    return [*_FIELDS[:at], *(_PROBABILITY + name for name in classes), *_FIELDS[at + 1 :]]


def _flat(row: Row) -> dict[str, Any]:
    """The row with a column for each probability."""
    values = asdict(row)
    probabilities = values.pop("probabilities") or {}
    return values | {_PROBABILITY + name: value for name, value in probabilities.items()}


def _row_of(values: Mapping[str, Any], path: Path) -> Row:
    """The row that a table's record was made from; raises InvalidRequest where the table is not one of ours."""
    try:
        known = {name: values[name] for name in _FIELDS if name != "probabilities"}
    except KeyError as exc:
        raise InvalidRequest(f"{path} is no table of predictions: name another file with --out.") from exc
    found = {
        name.removeprefix(_PROBABILITY): value
        for name, value in values.items()
        if name.startswith(_PROBABILITY) and value is not None
    }
    return Row(**known, probabilities=values.get("probabilities") or found or None)


def _sync(file: IO[str]) -> None:
    file.flush()
    os.fsync(file.fileno())
