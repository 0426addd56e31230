"""Rows that lie in files are the rows that would lie in memory: same values, same refusals, whoever wrote them."""

import gzip
import hashlib
import json
import logging
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from medloop.data.columns import Columns, MappedRows, map_rows
from medloop.data.leaks import leaked_rows
from medloop.data.manifest import CORRECTION, SPLITS, Manifest, Row, dataset_key, load_manifest
from medloop.data.row import digest
from medloop.errors import MedLoopError
from medloop.storage.objects import ObjectStore

CLASSES = ("cat", "dög", 'the "other"')


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def row(number: int, **values: object) -> Row:
    plain = Row(sha(f"{number}"), sha(f"{number} pixels"), CLASSES[number % 3], SPLITS[number % 4], location="images/1")
    return replace(plain, **values)  # type: ignore[arg-type]


ROWS = (
    *(row(number) for number in range(12)),
    row(12, group="patient 7", source=CORRECTION, metadata={"age": 7, "dose": 0.25, "sex": None, "left": True}),
    row(13, group="Müller", source='a "word"', metadata={"ä": "ö", "none": "}"}, location="été\\1"),
    row(14, metadata={"a": '{},"pixel_hash":"0"'}, pixel_hash="no hash at all"),
    row(15, pixel_hash=row(2).pixel_hash, split="train"),  # row 2 stands in calibration
    row(16, pixel_hash=row(2).pixel_hash[:40] + "0" * 24, split="train"),  # which has other pixels
    row(12, group="patient 7", source=CORRECTION, metadata={"age": 7, "dose": 0.25, "sex": None, "left": True}),
)


def stored(objects: ObjectStore, lines: Sequence[str], name: str) -> str:
    """A version as somebody else may have written it."""
    summary = {"name": "zoo", "classes": CLASSES, "parent": None}
    objects.put(dataset_key(name, "manifest.jsonl.gz"), gzip.compress("\n".join(lines).encode()))
    objects.put(dataset_key(name, "dataset.json"), json.dumps(summary).encode())
    return name


def found(objects: ObjectStore, name: str, folder: Path | None) -> Manifest | tuple[type, str]:
    try:
        return load_manifest(objects, name, folder=folder)
    except MedLoopError as exc:
        return type(exc), exc.detail


def test_rows_in_files_are_those_in_memory(objects: ObjectStore, tmp_path: Path) -> None:
    saved = Manifest("zoo", CLASSES, ROWS)
    saved.save(objects)
    mapped = load_manifest(objects, saved.id, folder=tmp_path / "rows")
    assert isinstance(mapped.rows, MappedRows)
    assert mapped == saved
    assert (mapped.rows[-1], mapped.rows[3:5], mapped.of("val")) == (saved.rows[-1], saved.rows[3:5], saved.of("val"))
    assert replace(mapped, classes=CLASSES[::-1]).id == replace(saved, classes=CLASSES[::-1]).id != saved.id
    for column in Columns.__slots__:
        one, other = getattr(mapped.columns, column), getattr(saved.columns, column)
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)
    assert mapped.counts() == saved.counts()
    assert not list((tmp_path / "rows").iterdir()), "the files have no names"
    with pytest.raises(IndexError):
        mapped.rows[len(ROWS)]


def test_equal_pixels_are_found_and_alike_ones_are_not(objects: ObjectStore, tmp_path: Path) -> None:
    saved = Manifest("zoo", CLASSES, ROWS)
    saved.save(objects)
    for manifest in (saved, load_manifest(objects, saved.id, folder=tmp_path)):
        assert [manifest.rows[i] for i in leaked_rows(manifest, "train")] == [ROWS[15]]


LINES = sorted(one.to_json() for one in Manifest("zoo", CLASSES, ROWS).rows)
ID = Manifest("zoo", CLASSES, ROWS).id
SPACED = [json.dumps(json.loads(line)) for line in LINES]
UNSORTED = row(1, metadata={"a": 1, "b": 2}).to_json().replace('"a":1,"b":2', '"b":2,"a":1')
BAD = [
    LINES[0].replace('"cat"', '"cow"').replace(json.dumps(CLASSES[1]), '"cow"'),
    LINES[0].replace(json.loads(LINES[0])["split"], "holdout"),
    LINES[0].replace('"metadata":{}', '"metadata":{"age":NaN}'),
    LINES[0].replace('"metadata":{}', '"metadata":{"age":}'),
    LINES[0].replace('"metadata":{}', '"metadata":[]'),
    LINES[0].replace('"metadata":{}', '"meta":{}'),
    LINES[0].replace('"group":""', '"group":5'),
    LINES[0].replace('{"byte_hash":"', '{"byte_hash":"X'),
    "[1]",
    "",
]


@pytest.mark.parametrize("lines", [LINES, SPACED, LINES[::-1], [*LINES[1:], LINES[0]], LINES[1:], [*LINES, LINES[-1]]])
def test_whoever_wrote_the_file_it_is_read_the_same(objects: ObjectStore, tmp_path: Path, lines: list[str]) -> None:
    name = stored(objects, lines, ID)
    assert found(objects, name, tmp_path) == found(objects, name, None)


@pytest.mark.parametrize("line", BAD)
def test_what_is_refused_in_memory_is_refused_in_files(objects: ObjectStore, tmp_path: Path, line: str) -> None:
    name = stored(objects, [line, *LINES[1:]], ID)
    refused = found(objects, name, None)
    assert isinstance(refused, tuple)
    assert found(objects, name, tmp_path) == refused


def test_an_id_of_another_spelling_is_none(objects: ObjectStore, tmp_path: Path) -> None:
    """The id is that of the canonical lines, also where a file holds others that were digested as they are."""
    assert row(1, metadata={"a": 1, "b": 2}).to_json() != UNSORTED
    written = UNSORTED.replace('"location":"images/1",', "").encode()
    name = stored(objects, [UNSORTED], digest(CLASSES, [written]))
    refused = found(objects, name, None)
    assert isinstance(refused, tuple)
    assert found(objects, name, tmp_path) == refused


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
numbers = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.builds(
    row,
    st.integers(0, 40),
    group=texts,
    source=texts | st.just(CORRECTION),
    location=texts,
    metadata=st.dictionaries(texts, texts | numbers, max_size=3),
    pixel_hash=texts | st.just(sha("same")),
)


@given(st.lists(values, min_size=1, max_size=5))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_row_comes_back(tmp_path: Path, rows: list[Row]) -> None:
    saved = Manifest("zoo", CLASSES, rows)
    mapped = map_rows([one.to_json().encode() for one in saved.rows], CLASSES, tmp_path)
    assert mapped is not None
    assert (mapped.id, mapped) == (saved.id, saved.rows)
    keys = mapped.columns.pixels
    for (i, one), (j, other) in pairwise(enumerate(saved.rows)):
        assert keys[i] == keys[j] or one.pixel_hash != other.pixel_hash


def test_where_no_file_can_be_rows_are_held_in_memory(
    objects: ObjectStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = Manifest("zoo", CLASSES, ROWS)
    saved.save(objects)
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert load_manifest(objects, saved.id, folder=tmp_path / "file") == saved
    assert "held in memory" in caplog.text


def test_a_row_more_takes_no_more_memory(tmp_path: Path) -> None:
    lines = sorted(row(number, group=f"patient {number}").to_json().encode() for number in range(2000))
    tracemalloc.start()
    try:
        few = map_rows(lines[:10], CLASSES, tmp_path)
        before, _ = tracemalloc.get_traced_memory()
        many = map_rows(lines, CLASSES, tmp_path)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert few is not None
    assert many is not None
    assert len(many) == 2000
    assert after - before < 5 * 2000, "bytes"
