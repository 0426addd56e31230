"""What every record store promises."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from medloop.errors import InvalidRequest
from medloop.schemas import ModelRef, Prediction, new_id
from medloop.storage.records import FIELDS, Encoded, RecordStore, scan


def _put(records: RecordStore, documents: Sequence[dict[str, Any]], kind: str = "corrections") -> list[str]:
    """Store the documents in this order; gives their ids."""
    ids = [new_id() for _ in documents]
    for record_id, document in zip(ids, documents, strict=True):
        assert records.put_once(kind, record_id, document)
    return ids


AWKWARD: dict[str, Any] = {
    "whole": 1,
    "real": 1.0,
    "tiny": 5e-324,
    "huge": 2**70,
    "yes": True,
    "nothing": None,
    "text": 'ümlaut 🩻 "quoted" \\ line\nend \0',
    "list": [1, [2, {"deep": []}], {}],
    "": "empty key",
    "$set": {"a.b": 1, "$c": 2},
    "St. Elmo": 0.5,
    "_id": "mine",
    "revision": "mine too",
    "document": "and this",
}


def test_gives_back_exactly_what_was_put(records: RecordStore) -> None:
    assert records.put_once("audit", "1", AWKWARD)
    record = records.get("audit", "1")
    assert record is not None
    assert (record.id, record.revision) == ("1", 1)
    assert repr(record.document) == repr(AWKWARD)  # also the order of keys, and 1 apart from 1.0 and True


def test_a_document_that_came_as_json_is_the_same_record(records: RecordStore) -> None:
    known = {name: value for name, value in AWKWARD.items() if name != "document"}
    assert records.put_once("audit", "1", Encoded(json.dumps(known)))
    assert records.put_many("audit", [("2", Encoded('{"type": "found by"}') | {"more": 1})]) == 1
    record = records.get("audit", "1")
    assert record is not None
    assert repr(record.document) == repr(known)
    (found,) = records.find("audit", {"type": "found by"}).items
    assert found.document == {"type": "found by", "more": 1}


@pytest.mark.parametrize("text", ["", "[1]", '{"a": NaN}', '{"a": 1', '"text"'])
def test_what_is_no_json_object_is_no_document(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Encoded(text)


def test_what_is_not_there(records: RecordStore) -> None:
    assert records.get("audit", "absent") is None
    assert records.find("audit").items == ()
    assert records.count_by("audit", "type") == {}
    assert not records.compare_and_set("audit", "absent", 1, {})
    assert records.get("audit", "absent") is None


def test_put_once_keeps_the_first(records: RecordStore) -> None:
    assert records.put_once("audit", "1", {"type": "first"})
    assert not records.put_once("audit", "1", {"type": "second"})
    assert records.put_once("jobs", "1", {"type": "another kind"})
    record = records.get("audit", "1")
    assert record is not None
    assert record.document == {"type": "first"}


def test_put_many_adds_what_is_new_and_keeps_what_is_there(records: RecordStore) -> None:
    assert records.put_many("corrections", []) == 0
    records.put_once("corrections", "b", {"status": "first"})
    documents = [("a", {"status": "new"}), ("b", {"status": "second"}), ("c", {}), ("a", {"status": "again"})]
    assert records.put_many("corrections", documents) == 2
    assert records.put_many("corrections", documents) == 0
    found = records.find("corrections", newest_first=False).items
    assert [(record.id, record.revision, record.document) for record in found] == [
        ("a", 1, {"status": "new"}),
        ("b", 1, {"status": "first"}),
        ("c", 1, {}),
    ]
    assert [record.id for record in records.find("corrections", {"status": "new"}).items] == ["a"]


@pytest.mark.parametrize("bad", [("x y", {}), ("z", {"label": 1}), ("z", {"x": float("nan")})])
def test_of_a_batch_with_one_that_is_no_record_nothing_is_written(
    records: RecordStore, bad: tuple[str, dict[str, Any]]
) -> None:
    with pytest.raises(InvalidRequest):
        records.put_many("corrections", [("a", {}), bad, ("b", {})])
    with pytest.raises(InvalidRequest):
        records.put_many("patients", [])
    assert records.find("corrections").items == ()


def test_of_many_writers_of_one_batch_each_record_is_new_to_one(records: RecordStore) -> None:
    batch = [(f"{i:03d}", {"n": i}) for i in range(50)]
    with ThreadPoolExecutor(4) as pool:
        new = list(pool.map(lambda _: records.put_many("audit", batch), range(8)))
    assert sum(new) == 50
    assert [record.document["n"] for record in records.find("audit", newest_first=False).items] == list(range(50))


def test_compare_and_set_needs_the_present_revision(records: RecordStore) -> None:
    records.put_once("corrections", "1", {"status": "pending", "comment": "dropped by the next"})
    assert records.compare_and_set("corrections", "1", 1, {"status": "accepted"})
    assert not records.compare_and_set("corrections", "1", 1, {"status": "rejected"})
    assert not records.compare_and_set("corrections", "1", 3, {"status": "rejected"})
    record = records.get("corrections", "1")
    assert record is not None
    assert (record.revision, record.document) == (2, {"status": "accepted"})


def test_changed_fields_are_found_anew(records: RecordStore) -> None:
    (record_id,) = _put(records, [{"status": "pending", "label": "Hand"}])
    assert records.compare_and_set("corrections", record_id, 1, {"status": "accepted"})
    assert records.find("corrections", {"status": "pending"}).items == ()
    assert [record.id for record in records.find("corrections", {"status": "accepted", "label": None}).items] == [
        record_id
    ]


def test_of_many_writers_exactly_one_puts(records: RecordStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: records.put_once("audit", "1", {"actor": str(i)}), range(32)))
    assert sum(won) == 1
    record = records.get("audit", "1")
    assert record is not None
    assert record.document == {"actor": str(won.index(True))}


def test_no_update_is_lost(records: RecordStore) -> None:
    records.put_once("audit", "1", {"count": 0})

    def add_one(_: int) -> None:
        while True:
            record = records.get("audit", "1")
            assert record is not None
            if records.compare_and_set("audit", "1", record.revision, {"count": record.document["count"] + 1}):
                return

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add_one, range(40)))
    record = records.get("audit", "1")
    assert record is not None
    assert (record.revision, record.document) == (41, {"count": 40})


@pytest.mark.parametrize("newest_first", [True, False])
@pytest.mark.parametrize("limit", [1, 2, 5, 6, 100])
def test_pages_give_every_record_once_in_order(records: RecordStore, limit: int, newest_first: bool) -> None:
    ids = _put(records, [{"status": "pending" if i % 2 else "accepted"} for i in range(12)])[1::2]
    found, cursor = [], None
    while True:
        page = records.find("corrections", {"status": "pending"}, limit=limit, cursor=cursor, newest_first=newest_first)
        assert len(page.items) <= limit
        found += [record.id for record in page.items]
        if (cursor := page.cursor) is None:
            break
        assert page.items, "a cursor promises that there is more"
    assert found == (ids[::-1] if newest_first else ids)


def test_what_is_put_while_paging_shifts_nothing(records: RecordStore) -> None:
    ids = _put(records, [{}] * 4)
    first = records.find("corrections", limit=2)
    _put(records, [{}])
    second = records.find("corrections", limit=2, cursor=first.cursor)
    assert [record.id for record in (*first.items, *second.items)] == ids[::-1]


def test_scan_reads_all_pages(records: RecordStore) -> None:
    ids = _put(records, [{"model": "m"}] * 101)
    assert [record.id for record in scan(records, "corrections", {"model": "m"}, newest_first=False)] == ids


def test_where_joins_fields_and_null_means_missing_too(records: RecordStore) -> None:
    ids = _put(
        records,
        [
            {"model": "a", "version": "1"},
            {"model": "a", "version": None},
            {"model": "a"},
            {"model": "b", "version": "1"},
            {"model": "A", "version": "1"},
        ],
    )

    def found(**where: str | None) -> list[str]:
        return [record.id for record in records.find("corrections", where, newest_first=False).items]

    assert found(model="a", version="1") == ids[:1]
    assert found(model="a", version=None) == ids[1:3]
    assert found(version="1") == [ids[0], ids[3], ids[4]]
    assert found(model="a' OR 1=1 --") == []
    assert found() == ids


def test_count_by_counts_values(records: RecordStore) -> None:
    _put(records, [{"label": label, "model": "m"} for label in ("Hand", "Hand", "CXR", None, "St. Elmo", "$x")])
    _put(records, [{"label": "Hand", "model": "other"}])
    assert records.count_by("corrections", "label") == {"Hand": 3, "CXR": 1, "St. Elmo": 1, "$x": 1}
    assert records.count_by("corrections", "label", {"model": "m"}) == {"Hand": 2, "CXR": 1, "St. Elmo": 1, "$x": 1}
    assert records.count_by("corrections", "label", {"label": "CXR"}) == {"CXR": 1}
    assert records.count_by("corrections", "status") == {}


def test_a_prediction_is_found_by_the_model_in_it(records: RecordStore) -> None:
    model = ModelRef(name="hands", version="3", run_id="r", dataset_id="d", bundle_digest="b")
    prediction = Prediction(
        model=model,
        image_hash="ab",
        label="St. Elmo",
        probabilities={"St. Elmo": 0.75, "b": 0.25},
        prediction_set=["St. Elmo"],
        coverage=0.9,
        milliseconds={"run": 1.5},
    )
    records.put_once("predictions", prediction.id, prediction.model_dump(mode="json"))
    (record,) = records.find("predictions", {"model": "hands", "version": "3", "image_hash": "ab"}).items
    assert Prediction.model_validate(record.document) == prediction
    assert records.count_by("predictions", "label", {"model": "hands"}) == {"St. Elmo": 1}
    with pytest.raises(InvalidRequest, match=r"model\.name"):
        records.put_once("predictions", new_id(), {"model": "hands", "version": "3"})


@pytest.mark.parametrize(
    "document",
    [
        {"x": float("nan")},
        {"x": float("inf")},
        {"x": {1, 2}},
        {"x": b"bytes"},
        {"x": "\ud800"},
        {"x": "much " * 2_000_000},
        {"type": 1},
        {"type": True},
        {"type": ["list"]},
        {"type": "with \0"},
    ],
    ids=["nan", "infinity", "set", "bytes", "surrogate", "too large", "integer", "boolean", "list", "NUL"],
)
def test_refuses_what_is_no_document(records: RecordStore, document: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        records.put_once("audit", "1", document)
    records.put_once("audit", "2", {})
    with pytest.raises(InvalidRequest):
        records.compare_and_set("audit", "2", 1, document)
    assert [record.document for record in records.find("audit").items] == [{}]


@pytest.mark.parametrize("record_id", ["", "with space", "a/b", "$where", "x" * 129, "é", "a\n"])
def test_refuses_odd_ids(records: RecordStore, record_id: str) -> None:
    with pytest.raises(InvalidRequest):
        records.put_once("audit", record_id, {})
    with pytest.raises(InvalidRequest):
        records.get("audit", record_id)
    with pytest.raises(InvalidRequest):
        records.compare_and_set("audit", record_id, 1, {})
    with pytest.raises(InvalidRequest):
        records.find("audit", cursor=record_id)


def test_finds_by_declared_fields_only(records: RecordStore) -> None:
    with pytest.raises(InvalidRequest, match="comment"):
        records.find("corrections", {"comment": "x"})
    with pytest.raises(InvalidRequest, match="comment"):
        records.count_by("corrections", "comment")
    with pytest.raises(InvalidRequest, match="comment"):
        records.count_by("corrections", "label", {"comment": "x"})
    for value in ("\ud800", "with \0"):
        with pytest.raises(InvalidRequest, match="whole characters"):
            records.find("corrections", {"label": value})
    for limit in (0, -1, 1001):
        with pytest.raises(InvalidRequest, match="1 to 1000"):
            records.find("corrections", limit=limit)


def test_knows_its_kinds_only(records: RecordStore) -> None:
    for kind in FIELDS:
        assert records.find(kind).items == ()
    with pytest.raises(InvalidRequest):
        records.put_once("patients", "1", {})
    with pytest.raises(InvalidRequest):
        records.get("patients", "1")
    with pytest.raises(InvalidRequest):
        records.find("patients")


def test_answers_a_ping_and_closes_twice(records: RecordStore) -> None:
    records.ping()
    records.close()
    records.close()


def test_names_itself(records: RecordStore) -> None:
    assert records.url in repr(records)
