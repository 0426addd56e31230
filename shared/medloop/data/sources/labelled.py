"""Files that a table labels: a CSV or Parquet manifest, or a folder (of DICOM files above all) with a label table.

Columns: `label`, and `path` (relative to the table; for a folder, to that) or, for DICOM, `sop_instance_uid`. `split`
and `group` may be there; every other column is metadata. Values of a CSV stay text.
"""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medloop.data.manifest import Scalar, Split
from medloop.data.sources.dicom import instance_uid, plain_image
from medloop.data.sources.source import UNREADABLE, RawImage, Source, ordered_classes, slug, summed_up
from medloop.data.sources.tree import read_file
from medloop.data.splits import split_named
from medloop.errors import InvalidDataset, InvalidImage, Issue
from medloop.vision.dicom import is_dicom

_PATH, _UID = "path", "sop_instance_uid"
_ROLES = frozenset({_PATH, _UID, "label", "split", "group"})


@dataclass(frozen=True, slots=True)
class _Entry:
    """One row of a table. `where` names it in messages."""

    where: str
    file: Path
    label: str
    split: Split | None
    group: str
    metadata: Mapping[str, Scalar] = field(default_factory=dict)


def table_source(table: Path) -> Source:
    """A manifest: a table whose paths are relative to itself. Raises `InvalidDataset` when it is no such table."""
    rows = read_table(table)
    if _PATH not in rows[0]:
        raise InvalidDataset(f"{table.name} has no column `path`; needed are path and label.")
    return _source(
        table, rows, {number: table.parent / str(row[_PATH] or "") for number, row in enumerate(rows)}, table.stem
    )


def labelled_folder_source(folder: Path, labels: Path) -> Source:
    """The files of `folder` that the table `labels` names by path or by SOP instance UID."""
    rows = read_table(labels)
    if _PATH in rows[0]:
        files = {number: folder / _text(row[_PATH]) for number, row in enumerate(rows)}
        return _source(labels, rows, files, folder.resolve().name)
    if _UID not in rows[0]:
        raise InvalidDataset(f"{labels.name} has neither a column `path` nor `sop_instance_uid`; add one.")
    found, issues = _instances(folder, exclude=labels)
    uids = [_text(row[_UID]) for row in rows]
    files = {number: found.get(uid, folder / f"instance {uid}") for number, uid in enumerate(uids)}
    unnamed = [path.relative_to(folder).as_posix() for uid, path in found.items() if uid not in set(uids)]
    warnings = summed_up("unlabelled", unnamed, f"not in {labels.name}; it was left out")
    return _source(labels, rows, files, folder.resolve().name, issues, warnings)


def read_table(path: Path) -> list[dict[str, Scalar]]:
    """The rows of a .csv (UTF-8) or .parquet with a column `label`. Raises `InvalidDataset`, saying what is wrong."""
    rows = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path)
    if not rows:
        raise InvalidDataset(f"{path.name} has no rows; add a header with path and label, and a row for each image.")
    if "label" not in rows[0]:
        raise InvalidDataset(f"{path.name} has no column `label`; it has {', '.join(map(str, rows[0]))}.")
    return rows


def _read_csv(path: Path) -> list[dict[str, Scalar]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows: list[dict[str, Scalar]] = []
            for row in reader:
                if None in row or None in row.values():
                    raise InvalidDataset(f"Line {reader.line_num} of {path.name} has not as many fields as the header.")
                rows.append({name.strip(): value.strip() or None for name, value in row.items()})
            return rows
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise InvalidDataset(f"{path.name} cannot be read as CSV in UTF-8 ({exc}); save it again.") from exc


def _read_parquet(path: Path) -> list[dict[str, Scalar]]:
    try:
        # An extra of the distribution, and a slow import that only Parquet needs.
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as exc:
        raise InvalidDataset(
            "Parquet files need pyarrow; install medloop with its extra `data`, or save the table as CSV."
        ) from exc
    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as exc:
        raise InvalidDataset(f"{path.name} is no readable Parquet file; save it again.") from exc
    return [{str(name): _scalar(value) for name, value in row.items()} for row in rows]


def _scalar(value: Any) -> Scalar:
    """A cell as JSON can hold it: no NaN, no infinity, and times and the like as text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)


def _text(value: Scalar) -> str:
    """A cell as a name; whole numbers lose the `.0` that missing values in the same column give them."""
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _source(
    table: Path,
    rows: list[dict[str, Scalar]],
    files: Mapping[int, Path],
    name: str,
    unreadable: tuple[Issue, ...] = (),
    warnings: tuple[Issue, ...] = (),
) -> Source:
    entries: list[_Entry] = []
    issues = [*unreadable]
    for number, row in enumerate(rows):
        # Counted as an editor shows it: the header is line 1.
        where = f"{table.name}, row {number + 2}"
        entry = _entry(where, row, files[number])
        if isinstance(entry, Issue):
            issues.append(entry)
        else:
            entries.append(entry)
    return Source(
        ordered_classes(entry.label for entry in entries),
        slug(name),
        "label-table",
        len(entries),
        lambda: (_image(entry) for entry in entries),
        tuple(issues),
        warnings,
    )


def _entry(where: str, row: Mapping[str, Scalar], file: Path) -> _Entry | Issue:
    label, split = _text(row["label"]), _text(row.get("split"))
    if not label:
        return Issue("no-label", where, "has no label; fill it in or remove the row")
    if split and split_named(split) is None:
        return Issue("unknown-split", where, f"says split {split!r}; use train, val, calibration or test")
    if not file.is_file():
        return Issue(
            "missing-file", where, f"names {file.name}, which is not there; correct the path or remove the row"
        )
    metadata = {name: value for name, value in row.items() if name not in _ROLES}
    return _Entry(where, file, label, split_named(split) if split else None, _text(row.get("group")), metadata)


def _image(entry: _Entry) -> RawImage | Issue:
    name = f"{entry.where} ({entry.file.name})"
    data, group = plain_image(read_file(entry.file, name), name)
    if isinstance(data, Issue):
        return data
    return RawImage(data, entry.label, entry.split, entry.group or group, name, entry.metadata)


def _instances(folder: Path, *, exclude: Path) -> tuple[dict[str, Path], tuple[Issue, ...]]:
    """DICOM files below `folder` by SOP instance UID, and those that cannot be read; others are passed over."""
    found: dict[str, Path] = {}
    issues: list[Issue] = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != exclude):
        name = path.relative_to(folder).as_posix()
        data = read_file(path, name)
        try:
            if isinstance(data, bytes) and is_dicom(data):
                found.setdefault(instance_uid(data), path)
        except InvalidImage as exc:
            issues.append(Issue(UNREADABLE, name, exc.detail))
    return found, tuple(issues)
