"""What a replica could not record before it ended is recorded once by another one, whatever happens in between."""

import hashlib
import json
import logging
import math
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import boto3
import numpy as np
import pytest
from medloop.errors import StorageUnavailable
from medloop.http import Readiness
from medloop.schemas import new_id
from medloop.settings import StorageSettings
from medloop.storage.folder import FolderObjects
from medloop.storage.objects import ObjectStore, open_objects
from medloop.storage.records import RecordStore, scan
from medloop.testing import free_port
from medloop.vision.decode import DEFAULT_LIMITS
from medloop.vision.encode import encode_png
from medloop_inference import handover
from medloop_inference.delivery import Entry, pack
from medloop_inference.frames import join_frames
from medloop_inference.handover import ASIDE, PREFIX, Collector, Handover
from medloop_inference.records import Recorder
from medloop_inference.service import Service
from medloop_inference.settings import ServingSettings, Settings
from medloop_inference.spool import Spool
from moto.server import ThreadedMotoServer
from prometheus_client import CollectorRegistry, generate_latest

from .conftest import MODEL, NEVER

COUNT = 450
"""Predictions that wait: more than two batches of records."""
NAMED = b"Jane Doe"


def never() -> bool:
    return False


def entries(count: int = COUNT, image: bytes | None = None) -> list[Entry]:
    return [Entry(b'{"id": "%06d", "model": {"name": "tiny"}}' % number, image) for number in range(count)]


def recorded(records: RecordStore) -> list[str]:
    """Ids, each of which was written once."""
    found = list(scan(records, "predictions", newest_first=False))
    assert all(record.revision == 1 for record in found)
    return [record.id for record in found]


def segments(root: Path) -> list[Path]:
    return sorted(root.rglob("*.frames"))


def left(objects: ObjectStore) -> list[str]:
    return list(objects.list(PREFIX))


class Away:
    """Records that do not answer."""

    def put_many(self, kind: str, items: Sequence[Any]) -> int:
        raise StorageUnavailable("The records are away; try again.")

    def ping(self) -> None:
        raise StorageUnavailable("The records do not answer; check that they run.")


AWAY: Any = Away()


def end_while_records_are_away(objects: ObjectStore, root: Path, waiting: Sequence[Entry]) -> Recorder:
    recorder = Recorder(AWAY, objects, Spool(root), handover=Handover(objects, "one"))
    recorder.record(waiting)
    recorder.start()
    recorder.stop(30)
    return recorder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def collector(records: RecordStore, objects: ObjectStore) -> Collector:
    return Collector(records, objects, never)


def test_what_records_did_not_take_is_recorded_by_another_replica(
    records: RecordStore, objects: ObjectStore, collector: Collector, root: Path
) -> None:
    ended = end_while_records_are_away(objects, root, entries())
    assert (ended.waiting, segments(root)) == (0, [])
    (key,) = left(objects)
    assert key == f"{PREFIX}r-one/{hashlib.sha256(objects.get(key)).hexdigest()}.frames"
    collector.collect_once()
    assert len(recorded(records)) == COUNT
    assert list(objects.list()) == []
    assert (collector.recorded, collector.waiting, collector.refused, collector.damaged) == (COUNT, 0, 0, 0)


def test_the_largest_image_that_is_answered_is_taken(
    records: RecordStore, objects: ObjectStore, collector: Collector, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is no PNG or JPEG leaves the machine as pixels, however small it was; here all limits are a thousandth."""
    scale = 1000
    side = math.isqrt(DEFAULT_LIMITS.max_pixels // scale) & ~3
    head = struct.pack("<2sIII IiiHHIIiiII", b"BM", 54 + 3 * side**2, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)
    bitmap = head + np.random.default_rng(0).bytes(3 * side**2)
    for name in ("_TAKEN_BYTES", "_OBJECT_BYTES"):
        monkeypatch.setattr(handover, name, getattr(handover, name) // scale)
    large = Entry(b'{"id": "large", "model": {"name": "tiny"}}', bitmap)
    end_while_records_are_away(objects, root, [*entries(1, encode_png(np.zeros((8, 8), np.uint8))), large])
    (key,) = left(objects)
    assert len(objects.get(key)) > 3 * side**2
    collector.collect_once()
    assert (len(recorded(records)), left(objects), collector.damaged) == (2, [], 0)


def test_what_no_replica_can_have_left_is_not_read(
    records: RecordStore,
    objects: ObjectStore,
    collector: Collector,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = join_frames([pack(one) for one in entries(3)])
    digest = hashlib.sha256(data).hexdigest()
    foreign = [f"{PREFIX}r-large/{digest}.frames", f"{PREFIX}somebody/{digest}.frames"]
    for key in foreign:
        objects.put(key, data)
    monkeypatch.setattr(handover, "_TAKEN_BYTES", len(data) - 1)
    for _ in range(2):
        collector.collect_once()
    assert (recorded(records), left(objects)) == ([], foreign)
    assert (collector.damaged, collector.waiting) == (1, 0)
    assert [foreign[0] in line for line in caplog.messages] == [True]


def test_an_image_leaves_the_machine_without_its_metadata(
    records: RecordStore, objects: ObjectStore, collector: Collector, root: Path
) -> None:
    plain = encode_png(np.full((8, 8), 9, np.uint8))
    end = plain.index(b"IEND") - 4
    named = plain[:end] + len(NAMED).to_bytes(4) + b"tEXt" + NAMED + bytes(4) + plain[end:]
    waiting = [*entries(2, named), Entry(b'{"id": "unreadable", "model": {"name": "tiny"}}', NAMED)]
    end_while_records_are_away(objects, root, waiting)
    (key,) = left(objects)
    assert plain in objects.get(key)
    assert NAMED not in objects.get(key)
    collector.collect_once()
    image_hash = hashlib.sha256(plain).hexdigest()
    told = {record.id: record.document for record in scan(records, "predictions")}
    assert [told[each]["stored_image"] for each in ("000000", "000001")] == [image_hash] * 2
    assert told["unreadable"]["image_stored"] is False
    assert list(objects.list()) == [f"images/{image_hash[:2]}/{image_hash}"]


def test_much_becomes_objects_that_need_little_memory(objects: ObjectStore, collector: Collector) -> None:
    large = [pack(Entry(json.dumps({"id": str(i), "filler": "x" * 2**20}).encode())) for i in range(9)]
    assert Handover(objects).put(large, time.monotonic() + 30)
    assert [len(objects.get(key)) < 5.1 * 2**20 for key in left(objects)] == [True] * 3
    collector.collect_once()
    assert collector.recorded == 9


KILLED = """
import os, signal, sys, time
from pathlib import Path
from medloop.storage.folder import FolderObjects
from medloop_inference.delivery import Entry
from medloop_inference.handover import Handover
from medloop_inference.records import Recorder
from medloop_inference.spool import Spool

class Deadly(FolderObjects):
    def put_if_absent(self, key, data, *, durable=True):
        super().put_if_absent(key, data, durable=durable)
        os.kill(os.getpid(), signal.SIGKILL)

objects = Deadly(Path(sys.argv[1]))
recorder = Recorder(None, objects, Spool(Path(sys.argv[2])), handover=Handover(objects))
recorder.record([Entry(b'{"id": "%06d", "model": {"name": "tiny"}}' % number) for number in range(450)])
recorder.stop(30)
"""


def test_a_kill_between_the_object_and_the_disk_leaves_both_and_one_record(
    home: Path, records: RecordStore, objects: ObjectStore, collector: Collector, root: Path
) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(home / "objects"), str(root)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (len(left(objects)), len(segments(root))) == (1, 1)
    following = Recorder(records, objects, Spool(root))
    following.start()
    collector.collect_once()
    following.stop(30)
    assert len(recorded(records)) == COUNT
    assert (left(objects), segments(root)) == ([], [])


class DownObjects(FolderObjects):
    """Objects that take `room` more, then are away."""

    room = 0

    def put_if_absent(self, key: str, data: bytes, *, durable: bool = True) -> bool:
        if self.room == 0:
            raise StorageUnavailable("The objects are away; try again.")
        self.room -= 1
        return super().put_if_absent(key, data, durable=durable)


def test_without_objects_all_stays_on_the_disk_and_is_said(
    records: RecordStore, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    objects = DownObjects(tmp_path / "objects")
    ended = end_while_records_are_away(objects, root, entries())
    assert ended.waiting == COUNT
    said = [each.message for each in caplog.records if each.levelno == logging.ERROR]
    assert said == [
        "what waits cannot be handed over: The objects are away; try again.",
        f"{COUNT} predictions stay in the spool, and are lost if its disk ends with this container",
    ]
    following = Recorder(records, objects, Spool(root))
    following.start()
    following.stop(30)
    assert len(recorded(records)) == COUNT


def test_objects_that_go_away_halfway_have_what_left_the_disk(
    records: RecordStore, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    objects = DownObjects(tmp_path / "objects")
    objects.room = 2
    spool = Spool(root, segment_bytes=1)  # one segment for each append
    recorder = Recorder(AWAY, objects, spool, handover=Handover(objects))
    for each in entries(5):
        recorder.record([each])
    recorder.stop(30)
    assert (len(left(objects)), len(segments(root))) == (2, 3)
    assert "2 predictions lie in objects now" in caplog.text
    assert "3 predictions stay in the spool" in caplog.text
    Collector(records, objects, never).collect_once()
    assert recorded(records) == ["000000", "000001"]


class Stuck:
    """A store that hangs until it is told to go on, and then has failed."""

    def __init__(self) -> None:
        self.asked, self.go_on = threading.Event(), threading.Event()

    def hang(self, *_: object, **__: object) -> bool:
        self.asked.set()
        assert self.go_on.wait(60)
        raise StorageUnavailable("The store hung; try again.")

    put_many = put_if_absent = hang


def test_stores_that_hang_hold_up_neither_each_other_nor_the_end(root: Path) -> None:
    records, objects = Stuck(), Stuck()
    recorder = Recorder(cast(Any, records), cast(Any, objects), Spool(root), handover=Handover(cast(Any, objects)))
    recorder.record(entries(4))
    recorder.start()
    assert records.asked.wait(30)
    recorder.stop(timeout=1.0)
    assert objects.asked.is_set()
    assert recorder.waiting == 4
    for store in (records, objects):
        store.go_on.set()
    for thread in threading.enumerate():
        if thread.name in ("recorder", "handover"):
            thread.join(30)
    assert len(segments(root)) == 1


def test_two_replicas_that_collect_at_once_record_everything_once(
    records: RecordStore, objects: ObjectStore, root: Path
) -> None:
    for number in range(4):
        waiting = [Entry(b'{"id": "%d-%06d", "model": {"name": "tiny"}}' % (number, i)) for i in range(COUNT)]
        end_while_records_are_away(objects, root / str(number), waiting)
    together = threading.Barrier(2)
    collectors = [Collector(records, objects, never) for _ in range(2)]

    def collect(collector: Collector) -> None:
        together.wait(30)
        collector.collect_once()

    threads = [threading.Thread(target=collect, args=(each,)) for each in collectors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(recorded(records)) == 4 * COUNT
    assert list(objects.list()) == []
    assert sum(each.recorded for each in collectors) >= 4 * COUNT
    assert [(each.damaged, each.refused) for each in collectors] == [(0, 0)] * 2


class Overtaken(FolderObjects):
    """Objects that another replica collects right after they were listed."""

    another: Collector | None = None

    def list(self, prefix: str = "") -> Iterator[str]:
        found = [*super().list(prefix)]
        if (another := self.another) is not None:
            self.another = None
            another.collect_once()
        return iter(found)


def test_what_another_replica_was_faster_with_is_no_problem(
    records: RecordStore, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    objects = Overtaken(tmp_path / "objects")
    end_while_records_are_away(objects, root, entries(3))
    late, objects.another = Collector(records, objects, never), Collector(records, objects, never)
    caplog.clear()
    late.collect_once()
    assert (late.recorded, late.waiting, caplog.text) == (0, 0, "")
    assert len(recorded(records)) == 3


def test_a_replica_that_is_told_to_stop_leaves_the_rest_to_others(
    records: RecordStore, objects: ObjectStore, collector: Collector, root: Path
) -> None:
    end_while_records_are_away(objects, root, entries())
    asked = iter([False, False, True])  # before the object, before its first batch and before its second
    stopping = Collector(records, objects, lambda: next(asked))
    stopping.collect_once()
    assert len(left(objects)) == 1
    assert stopping.waiting == 1
    assert 0 < len(recorded(records)) < COUNT
    collector.collect_once()
    assert len(recorded(records)) == COUNT


def test_what_is_damaged_or_no_record_is_kept_aside_once_and_holds_up_nothing(
    records: RecordStore, objects: ObjectStore, collector: Collector, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    end_while_records_are_away(objects, root / "good", entries(3))
    end_while_records_are_away(objects, root / "damaged", [Entry(b'{"id": "a", "model": {}}'), Entry(b'{"id": "b"}')])
    damaged = next(key for key in left(objects) if b'"b"' in objects.get(key))
    spoilt = objects.get(damaged).replace(b'"b"', b'"c"')
    objects.put(damaged, spoilt)
    end_while_records_are_away(objects, root / "refused", [Entry(b"no JSON"), Entry(b'{"id": "d"}')])
    refused = next(key for key in left(objects) if b"no JSON" in objects.get(key))
    shortened = f"{PREFIX}r-one/{'0' * 64}.frames"  # between two frames, which only its name tells
    objects.put(shortened, join_frames([pack(Entry(b'{"id": "e"}'))]))
    objects.put(f"{PREFIX}readme.txt", b"not one of ours")
    for _ in range(2):
        collector.collect_once()
    assert recorded(records) == ["000000", "000001", "000002", "a", "d", "e"]
    assert left(objects) == [f"{PREFIX}readme.txt"]
    aside = [ASIDE + key.removeprefix(PREFIX) for key in (damaged, refused, shortened)]
    assert list(objects.list(ASIDE)) == sorted(aside)
    assert objects.get(aside[0]) == spoilt
    assert (collector.recorded, collector.refused, collector.damaged) == (6, 1, 2)
    assert caplog.text.count("it is kept as") == 3


def test_while_records_are_away_nothing_is_lost_and_it_is_said_once(
    records: RecordStore, objects: ObjectStore, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    idle = Collector(AWAY, objects, never)
    idle.collect_once()
    assert caplog.text == ""  # nothing is there, so nobody is asked
    end_while_records_are_away(objects, root, entries(3))
    caplog.clear()
    for _ in range(2):
        idle.collect_once()
    assert idle.waiting == 1
    assert [each.message for each in caplog.records] == [  # asked before anything was fetched for nothing
        "what replicas left in objects: The records do not answer; check that they run."
    ]
    assert len(left(objects)) == 1


@pytest.fixture(scope="module")
def moto_url() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(moto_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    name = f"spool-{new_id()}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}/some/prefix"


@pytest.fixture
def without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def test_a_service_on_s3_hands_over_and_the_next_one_looks(
    without_mlflow: None, bucket: str, records: RecordStore
) -> None:
    nowhere = f"mongodb://127.0.0.1:{free_port()}/medloop"
    ending = service_on(bucket, nowhere, CollectorRegistry())
    ending.recorder.record(entries())
    ending.recorder.stop(60)
    assert (ending.recorder.waiting, ending.spool.size) == (0, 0)
    registry, readiness = CollectorRegistry(), Readiness()
    following = service_on(bucket, nowhere, registry, readiness)
    following.start()
    deadline = time.monotonic() + 30
    while not following.collector.waiting and time.monotonic() < deadline:
        time.sleep(0.01)
    readiness.drain()
    readiness.stop_by = time.monotonic()  # what hangs in a neighbour is not waited for
    following.stop()
    text = generate_latest(registry).decode()
    assert "medloop_spool_objects 1.0" in text
    assert "medloop_spool_collected_total 0.0" in text
    objects = open_objects(bucket)
    Collector(records, objects, never).collect_once()
    assert len(recorded(records)) == COUNT
    assert left(objects) == []


def service_on(
    objects_url: str, records_url: str, registry: CollectorRegistry, readiness: Readiness | None = None
) -> Service:
    storage = StorageSettings(MEDLOOP_OBJECTS_URL=objects_url, MEDLOOP_RECORDS_URL=records_url)
    serving = ServingSettings(model=MODEL, poll_seconds=NEVER)
    return Service(Settings(serving=serving, storage=storage), readiness or Readiness(), registry)


@pytest.mark.parametrize("local", ["objects", "records"])
def test_beside_a_store_of_this_machine_the_spool_keeps_what_waits(
    home: Path, without_mlflow: None, bucket: str, local: str
) -> None:
    objects = (home / "objects").as_uri() if local == "objects" else bucket
    records = f"sqlite:///{home}/x" if local == "records" else f"mongodb://127.0.0.1:{free_port()}/medloop"
    ending = service_on(objects, records, CollectorRegistry())
    ending.recorder.record(entries(3))
    ending.recorder.stop(0)
    assert ending.recorder.waiting == 3
    assert left(open_objects(objects)) == []
