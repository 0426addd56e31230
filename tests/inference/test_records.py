"""Every answer's record is delivered exactly once in effect, whatever is down; an answer never waits for that."""

import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from medloop.errors import StorageUnavailable
from medloop.schemas import ModelRef, Prediction, new_id
from medloop.storage.folder import FolderObjects
from medloop.storage.objects import ObjectStore
from medloop.storage.records import RecordStore, open_records, scan
from medloop.vision.decode import decode
from medloop.vision.encode import encode_png
from medloop.vision.golden import awkward_images
from medloop_inference.delivery import Entry
from medloop_inference.records import Recorder
from medloop_inference.spool import Spool

REF = ModelRef(name="tiny", version="1", run_id="r", dataset_id="d", bundle_digest="b")


def entry(label: str = "dark", image: bytes | None = None) -> Entry:
    prediction = Prediction(
        model=REF,
        image_hash="0" * 64,
        label=label,
        probabilities={"dark": 1.0, "bright": 0.0},
        prediction_set=["dark"],
        coverage=0.95,
        image_stored=image is not None,
        milliseconds={"total": 1.0},
    )
    document = prediction.model_dump(mode="json") | {"request_id": "request-1", "caller": None, "embedding": "AAA="}
    return Entry(json.dumps(document).encode(), image)


def documents(entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
    found = [json.loads(each.document) for each in entries]
    return {each["id"]: each for each in found}


def recorded(records: RecordStore) -> dict[str, dict[str, Any]]:
    return {record.id: record.document for record in scan(records, "predictions")}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "did not happen within 30 s"
        time.sleep(0.01)


class Faulty:
    """A store that fails while it is `down`, after it has done `before_failing`; counts what it was asked."""

    def __init__(self, records: RecordStore) -> None:
        self._records = records
        self.down = False
        self.before_failing = False
        self.error: Exception = StorageUnavailable("The records are away; try again.")
        self.puts = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._records, name)

    def put_many(self, kind: str, items: Sequence[tuple[str, Mapping[str, Any]]]) -> int:
        self.puts += 1
        if not self.down:
            return self._records.put_many(kind, items)
        if self.before_failing:
            self._records.put_many(kind, items[: len(items) // 2])
        raise self.error


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool", segment_bytes=20_000)


@pytest.fixture
def faulty(records: RecordStore) -> Faulty:
    return Faulty(records)


@pytest.fixture
def recorder(faulty: Faulty, objects: ObjectStore, spool: Spool) -> Iterator[Recorder]:
    made = Recorder(faulty, objects, spool, first_backoff_s=0.05)
    yield made
    made.stop(1)


def segments(root: Path) -> list[Path]:
    return sorted(root.rglob("*.frames"))


def test_what_was_taken_is_recorded_as_it_was(recorder: Recorder, records: RecordStore, tmp_path: Path) -> None:
    recorder.start()
    entries = [entry() for _ in range(500)]
    for start in range(0, 500, 5):
        recorder.record(entries[start : start + 5])
    wait_until(lambda: recorder.waiting == 0)
    assert recorded(records) == documents(entries)
    assert (recorder.dropped, recorder.refused, recorder.problem) == (0, 0, None)
    assert segments(tmp_path) == []


def test_a_lone_entry_waits_for_no_other(recorder: Recorder, records: RecordStore) -> None:
    recorder.start()
    time.sleep(0.1)  # by now it has usually found nothing to do
    sent = entry()
    recorder.record([sent])
    wait_until(lambda: bool(recorded(records)))
    assert recorded(records) == documents([sent])


@pytest.mark.parametrize("before_failing", [False, True])
def test_records_that_come_back_get_all_of_it_and_nothing_twice(
    recorder: Recorder, faulty: Faulty, records: RecordStore, tmp_path: Path, before_failing: bool
) -> None:
    faulty.down, faulty.before_failing = True, before_failing
    recorder.start()
    entries = [entry() for _ in range(300)]
    for start in range(0, 300, 10):
        recorder.record(entries[start : start + 10])
    wait_until(lambda: faulty.puts >= 3)
    assert recorder.problem == "The records are away; try again."
    assert (recorder.waiting, recorder.dropped) == (300, 0)
    faulty.down = False
    wait_until(lambda: recorder.waiting == 0)
    assert recorded(records) == documents(entries)
    assert all(record.revision == 1 for record in scan(records, "predictions"))
    wait_until(lambda: recorder.problem is None)
    assert segments(tmp_path) == []


def test_what_waits_when_it_must_stop_is_recorded_after_the_next_start(
    recorder: Recorder, faulty: Faulty, records: RecordStore, objects: ObjectStore, tmp_path: Path
) -> None:
    faulty.down = True
    entries = [entry() for _ in range(50)]
    recorder.record(entries)
    recorder.start()
    recorder.stop(timeout=5)
    assert (recorder.waiting, recorder.dropped) == (50, 0)
    assert recorded(records) == {}
    following = Recorder(records, objects, Spool(tmp_path / "spool"))
    following.start()
    following.stop(timeout=30)
    assert recorded(records) == documents(entries)
    assert (following.waiting, segments(tmp_path)) == (0, [])


def test_stopping_delivers_what_came_last(recorder: Recorder, records: RecordStore) -> None:
    recorder.start()
    entries = [entry() for _ in range(1000)]
    recorder.record(entries)
    recorder.stop(timeout=30)
    assert recorded(records) == documents(entries)


class Stuck(Faulty):
    """Hangs in `put_many` until it is told to go on, as a server that does not answer does."""

    def __init__(self, records: RecordStore) -> None:
        super().__init__(records)
        self.entered, self.go_on = threading.Event(), threading.Event()

    def put_many(self, kind: str, items: Sequence[tuple[str, Mapping[str, Any]]]) -> int:
        self.entered.set()
        assert self.go_on.wait(60)
        return super().put_many(kind, items)


def test_a_store_that_hangs_keeps_neither_recording_nor_stopping_waiting(
    records: RecordStore, objects: ObjectStore, tmp_path: Path
) -> None:
    stuck = Stuck(records)
    recorder = Recorder(stuck, objects, Spool(tmp_path / "spool"))
    recorder.start()
    recorder.record([entry() for _ in range(2)])
    assert stuck.entered.wait(30)
    recorder.record([entry()])
    recorder.stop(timeout=0.2)
    assert stuck.puts == 0  # it still hangs
    following = Recorder(records, objects, Spool(tmp_path / "spool"))
    following.record([entry()])
    stuck.go_on.set()  # the old one wakes up beside the new one, and takes nothing from it
    wait_until(lambda: not recorder._thread.is_alive())
    assert following.waiting > 0
    following.start()
    following.stop(timeout=30)
    assert len(recorded(records)) == 4


RECORD = """
import sys
from pathlib import Path
from medloop.storage.objects import open_objects
from medloop.storage.records import open_records
from medloop_inference.delivery import Entry
from medloop_inference.records import Recorder
from medloop_inference.spool import Spool

home = Path(sys.argv[1])
records = open_records(f"sqlite:///{home / 'records.sqlite'}")
recorder = Recorder(records, open_objects((home / "objects").as_uri()), Spool(home / "spool"))
recorder.start()
number = 0
while True:
    recorder.record([Entry(b'{"id": "%08d", "model": {"name": "tiny"}}' % (number + i)) for i in range(3)])
    number += 3
    sys.stdout.write(f"{number} {recorder.dropped}\\n")
    sys.stdout.flush()
"""


def test_a_killed_service_has_everything_recorded_after_the_next_start(home: Path, objects: ObjectStore) -> None:
    child = subprocess.Popen([sys.executable, "-c", RECORD, str(home)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    first = child.stdout.readline()
    records = open_records(f"sqlite:///{home / 'records.sqlite'}")
    wait_until(lambda: bool(records.find("predictions", limit=1).items))  # some is delivered by now
    child.send_signal(signal.SIGKILL)
    reported, dropped = (first + child.communicate()[0]).split("\n")[-2].split()
    recorder = Recorder(records, objects, Spool(home / "spool"))
    recorder.start()
    recorder.stop(timeout=30)
    found = [record.id for record in scan(records, "predictions", newest_first=False)]
    records.close()
    assert dropped == "0"
    assert found[: int(reported)] == [f"{number:08d}" for number in range(int(reported))]


def test_what_no_record_can_be_is_set_aside_alone(
    recorder: Recorder, records: RecordStore, spool: Spool, tmp_path: Path
) -> None:
    good = [entry() for _ in range(20)]
    bad = [
        Entry(b"{"),
        Entry(b"[]"),
        Entry(b'{"label": "without id"}'),
        entry(label="NUL \0"),
    ]
    recorder.start()
    recorder.record([*good[:7], *bad, *good[7:]])
    wait_until(lambda: recorder.waiting == 0)
    assert recorded(records) == documents(good)
    assert (recorder.refused, recorder.dropped, recorder.problem) == (4, 0, None)
    assert b"NUL" in (tmp_path / "spool" / "0" / "refused").read_bytes()


def test_a_refused_one_is_set_aside_once_though_records_go_down(recorder: Recorder, faulty: Faulty) -> None:
    recorder.record([entry(), Entry(b"{"), entry()])
    faulty.down = True
    recorder.start()
    wait_until(lambda: faulty.puts >= 3)
    faulty.down = False
    wait_until(lambda: recorder.waiting == 0)
    assert recorder.refused == 1


def test_an_image_is_stored_without_metadata_before_its_record(
    recorder: Recorder, records: RecordStore, objects: ObjectStore
) -> None:
    images = [encode_png(np.full((8, 8), 9, np.uint8)), *awkward_images(16)[:3]]
    recorder.start()
    entries = [entry(image=image) for image in images]
    recorder.record(entries)
    wait_until(lambda: recorder.waiting == 0)
    found = recorded(records)
    for sent in entries:
        document = found[json.loads(sent.document)["id"]]
        image_hash = document.pop("stored_image")
        stored = objects.get(f"images/{image_hash[:2]}/{image_hash}")
        assert hashlib.sha256(stored).hexdigest() == image_hash
        assert np.array_equal(decode(stored).pixels, decode(sent.image or b"").pixels)
    assert found == documents(entries)


def test_a_record_is_not_lost_for_an_image_that_cannot_be_stored(
    recorder: Recorder, records: RecordStore, objects: ObjectStore
) -> None:
    sent = entry(image=b"no image")
    recorder.start()
    recorder.record([sent])
    wait_until(lambda: recorder.waiting == 0)
    (document,) = recorded(records).values()
    assert document == json.loads(sent.document) | {"image_stored": False}
    assert list(objects.list()) == []


class DownObjects(FolderObjects):
    """Objects that fail while they are `down`."""

    down = True

    def put_if_absent(self, key: str, data: bytes, *, durable: bool = True) -> bool:
        if self.down:
            raise StorageUnavailable("The objects are away; try again.")
        return super().put_if_absent(key, data, durable=durable)


def test_while_objects_are_down_no_record_claims_an_image(records: RecordStore, spool: Spool, tmp_path: Path) -> None:
    objects = DownObjects(tmp_path / "images")
    recorder = Recorder(records, objects, spool, first_backoff_s=0.05)
    recorder.start()
    entries = [entry(), entry(image=encode_png(np.zeros((8, 8), np.uint8)))]
    recorder.record(entries)
    wait_until(lambda: recorder.problem == "The objects are away; try again.")
    assert recorded(records) == {}
    objects.down = False
    wait_until(lambda: recorder.waiting == 0)
    assert recorded(records).keys() == documents(entries).keys()
    assert len(list(objects.list("images/"))) == 1
    recorder.stop(1)


def test_a_full_spool_drops_counts_and_says_so(records: RecordStore, objects: ObjectStore, tmp_path: Path) -> None:
    faulty = Faulty(records)
    faulty.down = True
    one = len(entry().document)
    recorder = Recorder(faulty, objects, Spool(tmp_path / "spool", max_bytes=5 * one), first_backoff_s=0.05)
    entries = [entry() for _ in range(10)]
    for each in entries:
        recorder.record([each])
    assert recorder.dropped == 6  # each has some bytes more around it
    assert "bring records and objects back" in (recorder.problem or "")
    faulty.down = False
    recorder.start()
    wait_until(lambda: recorder.waiting == 0)
    late = entry()
    recorder.record([late])
    recorder.stop(timeout=30)
    assert recorded(records) == documents([*entries[:4], late])
    assert (recorder.dropped, recorder.problem) == (6, None)


def test_an_unforeseen_failure_is_told_and_outlived(recorder: Recorder, faulty: Faulty, records: RecordStore) -> None:
    faulty.down, faulty.error = True, RuntimeError("what nobody thought of")
    recorder.start()
    sent = entry()
    recorder.record([sent])
    wait_until(lambda: recorder.problem is not None)
    faulty.down = False
    wait_until(lambda: recorder.waiting == 0)
    assert recorded(records) == documents([sent])


def test_ids_of_the_same_prediction_are_one_record(recorder: Recorder, records: RecordStore) -> None:
    sent = Entry(json.dumps({"id": new_id()}).encode())
    recorder.start()
    recorder.record([sent, sent])
    recorder.record([sent])
    wait_until(lambda: recorder.waiting == 0)
    assert recorded(records) == documents([sent])
