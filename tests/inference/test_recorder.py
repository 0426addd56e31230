"""Every answer's record is written or counted as lost; an answer never waits for records."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from medloop.schemas import ModelRef, Prediction
from medloop.storage.records import RecordStore, open_records
from medloop.storage.sqlite import SqliteRecords
from medloop_inference.recorder import Recorder

REF = ModelRef(name="tiny", version="1", run_id="r", dataset_id="d", bundle_digest="b")


def prediction(label: str = "dark") -> Prediction:
    return Prediction(
        model=REF,
        image_hash="0" * 64,
        label=label,
        probabilities={"dark": 1.0, "bright": 0.0},
        prediction_set=["dark"],
        coverage=0.95,
        milliseconds={"total": 1.0},
    )


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "did not happen within 10 s"
        time.sleep(0.01)


@pytest.fixture
def blocked(tmp_path: Path) -> Path:
    """Where a records file should be, there is a folder."""
    path = tmp_path / "blocked.sqlite"
    path.mkdir()
    return path


def test_what_was_offered_is_recorded_by_the_time_it_stops(records: RecordStore) -> None:
    recorder = Recorder(records)
    recorder.start()
    offered = [prediction() for _ in range(20)]
    for each in offered:
        recorder.offer(each, "request-1")
    recorder.stop()
    found = records.find("predictions", {"model": "tiny", "version": "1", "label": "dark"}).items
    assert [Prediction.model_validate(record.document) for record in reversed(found)] == offered
    assert {record.document["request_id"] for record in found} == {"request-1"}
    assert recorder.dropped == 0


def test_records_that_come_back_get_what_waited(blocked: Path) -> None:
    records = open_records(f"sqlite:///{blocked}")
    recorder = Recorder(records)
    recorder.start()
    recorder.offer(prediction(), None)
    wait_until(lambda: recorder.problem is not None)
    blocked.rmdir()
    wait_until(lambda: recorder.problem is None)
    recorder.stop()
    assert len(records.find("predictions").items) == 1
    assert recorder.dropped == 0
    records.close()


class SlowToFail(SqliteRecords):
    """Takes its time before it fails, as a server that cannot be reached does."""

    def put_once(self, kind: str, record_id: str, document: Mapping[str, Any]) -> bool:
        time.sleep(0.2)
        return super().put_once(kind, record_id, document)


def test_stopping_while_records_are_down_counts_what_is_lost_and_does_not_wait_for_each(blocked: Path) -> None:
    recorder = Recorder(SlowToFail(blocked))
    recorder.start()
    for _ in range(50):
        recorder.offer(prediction(), None)
    wait_until(lambda: recorder.problem is not None)
    started = time.monotonic()
    recorder.stop()
    assert recorder.dropped == 50
    assert time.monotonic() - started < 5


def test_a_full_queue_drops_and_counts_without_waiting(records: RecordStore) -> None:
    recorder = Recorder(records, capacity=3)
    for _ in range(5):
        recorder.offer(prediction(), None)
    assert recorder.dropped == 2
    recorder.start()
    recorder.stop()
    assert len(records.find("predictions").items) == 3


def test_a_document_that_records_refuse_is_lost_alone(records: RecordStore) -> None:
    recorder = Recorder(records)
    recorder.start()
    recorder.offer(prediction(label="NUL \0"), None)
    recorder.offer(prediction(), None)
    recorder.stop()
    assert len(records.find("predictions").items) == 1
    assert (recorder.dropped, recorder.problem) == (1, None)
