"""Prediction records: into the spool before the answer goes out, from there to records and objects in the background.

An answer waits for one write into the page cache of this machine and for nothing else. Whatever is delivered twice
changes nothing, since records are put once by their id and images by their hash.
"""

import hashlib
import logging
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medloop.errors import InvalidRequest, MedLoopError
from medloop.storage.objects import ObjectStore
from medloop.storage.records import Encoded, RecordStore
from medloop.vision.encode import strip_metadata

from medloop_inference.spool import Segment, Spool

logger = logging.getLogger(__name__)

KIND = "predictions"
BATCH = 200
"""Records put together: enough that a commit costs little, few enough that one batch takes well under a second."""
_EVERY_S = 0.25
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.5, 10.0
_ADOPT_EVERY_S = 15.0
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Entry:
    """What is to be recorded of one answer: the record as JSON (an object with a string `id`), and the encoded image
    where it is to be stored, in a format that `medloop.vision.encode.strip_metadata` takes (a frame of DICOM as
    canonical PNG). The record then gets `stored_image`, the hash that its object is named by."""

    document: bytes
    image: bytes | None = None


class Recorder:
    """Records predictions (kind `predictions`) through `spool`, which it closes when it is stopped.

    `problem` says why nothing can be recorded or spooled at the moment; `dropped` counts entries that never will be,
    `refused` those that records do not take (kept in the spool's file `refused`), `waiting` those still on their way.
    """

    def __init__(
        self, records: RecordStore, objects: ObjectStore, spool: Spool, *, first_backoff_s: float = _FIRST_BACKOFF_S
    ) -> None:
        self._records, self._objects, self._spool = records, objects, spool
        self._first_backoff_s = first_backoff_s
        self._segment: Segment | None = None
        self._delivered = 0  # of the segment's payloads
        self._ready: list[list[_Ready]] = []  # the batch after these, in parts that records have yet to take
        self._problem: str | None = None
        self._stopping = threading.Event()
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    @property
    def problem(self) -> str | None:
        return self._problem or self._spool.problem

    @property
    def dropped(self) -> int:
        return self._spool.dropped

    @property
    def refused(self) -> int:
        return self._spool.refused

    @property
    def waiting(self) -> int:
        return max(0, self._spool.waiting - self._delivered)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float = 15.0) -> None:
        """Deliver what waits within `timeout` seconds; the rest stays in the spool for the next start."""
        self._deadline = time.monotonic() + timeout
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        waiting = self.waiting
        self._spool.close()
        if waiting:
            logger.warning("%d predictions stay in the spool and are recorded after the next start", waiting)
        if self.dropped:
            logger.error("%d predictions were not recorded", self.dropped)

    def record(self, entries: Sequence[Entry]) -> None:
        """Take entries to be recorded; what has no room is counted. May be called by any thread."""
        self._spool.append([_pack(entry) for entry in entries])

    def _run(self) -> None:
        backoff, adopt_at = self._first_backoff_s, 0.0
        while True:
            stopping = self._stopping.is_set()
            pause = _EVERY_S
            try:
                if time.monotonic() >= adopt_at and not stopping:
                    self._spool.adopt()
                    adopt_at = time.monotonic() + _ADOPT_EVERY_S
                self._deliver_waiting()
            except MedLoopError as exc:
                self._report(exc.detail)
                pause = backoff
            except Exception:
                logger.exception("predictions cannot be recorded")
                self._report("Predictions cannot be recorded; see the log of inference.")
                pause = backoff
            else:
                self._report(None)
            if stopping:
                return
            if self._problem is None:
                backoff = self._first_backoff_s
            else:
                self._spool.sync()  # it may stay for long
                backoff = min(2 * backoff, _LONGEST_BACKOFF_S)
            self._stopping.wait(pause)

    def _report(self, problem: str | None) -> None:
        if (problem is None) != (self._problem is None):
            logger.warning("records: %s", problem or "written again")
        self._problem = problem

    def _deliver_waiting(self) -> None:
        """Deliver segment by segment until nothing waits, or the time to stop has come."""
        while time.monotonic() < self._deadline:
            if self._segment is None:
                self._segment = self._spool.take()
                if self._segment is None:
                    return
            payloads = self._segment.payloads[self._delivered : self._delivered + BATCH]
            if not self._ready:
                self._ready = [self._prepare(payloads)]
            self._put()
            self._delivered += len(payloads)
            if self._delivered >= len(self._segment.payloads):
                delivered, self._segment = self._segment, None
                self._delivered = 0  # before it is discarded: `waiting` may be told too much, never too little
                self._spool.discard(delivered)

    def _prepare(self, payloads: Sequence[bytes]) -> "list[_Ready]":
        """The records of a batch, their images stored; what cannot be a record is set aside."""
        ready, refused = [], []
        for payload in payloads:
            try:
                ready.append(_Ready(payload, *self._record_of(payload)))
            except InvalidRequest as exc:
                refused.append((payload, exc))
        for payload, reason in refused:  # only now: objects may fail halfway, and then all is done again
            self._refuse(payload, reason)
        return ready

    def _record_of(self, payload: bytes) -> tuple[str, dict[str, Any]]:
        entry = _unpack(payload)
        try:
            document = Encoded(entry.document.decode())
        except ValueError as exc:
            raise InvalidRequest(f"The record of a prediction is not JSON: {exc}.") from exc
        if not isinstance(record_id := document.get("id"), str):
            raise InvalidRequest("The record of a prediction has no id.")
        if entry.image is None:
            return record_id, document
        return record_id, document | self._store(entry.image)

    def _store(self, image: bytes) -> dict[str, Any]:
        """Store the image; what its record then says about it."""
        try:
            return {"stored_image": store_image(self._objects, strip_metadata(image))}
        except InvalidRequest as exc:  # it was answered, so the record must not be lost for it
            logger.error("the image of a prediction cannot be stored: %s", exc.detail)  # noqa: TRY400  no traceback helps
            return {"image_stored": False}

    def _put(self) -> None:
        """Put what is ready; what is refused is halved until those that are to blame stand alone."""
        while self._ready:
            part = self._ready[-1]
            try:
                self._records.put_many(KIND, [(each.record_id, each.document) for each in part])
            except InvalidRequest as exc:
                self._ready.pop()
                if len(part) == 1:
                    self._refuse(part[0].payload, exc)
                else:
                    self._ready += [part[len(part) // 2 :], part[: len(part) // 2]]
            else:
                self._ready.pop()

    def _refuse(self, payload: bytes, exc: InvalidRequest) -> None:
        logger.error("a prediction is set aside, since it cannot be recorded: %s", exc.detail)
        self._spool.refuse(payload)


@dataclass(frozen=True, slots=True)
class _Ready:
    payload: bytes
    record_id: str
    document: dict[str, Any]


def image_key(image_hash: str) -> str:
    """Where an image lies in objects; `image_hash` is the SHA-256 of what is stored."""
    return f"images/{image_hash[:2]}/{image_hash}"


def store_image(objects: ObjectStore, stripped: bytes) -> str:
    """Store an encoded image that holds nothing but pixels durably under its hash; returns that hash.

    Raises StorageUnavailable and StorageFull.
    """
    image_hash = hashlib.sha256(stripped).hexdigest()
    objects.put_if_absent(image_key(image_hash), stripped)
    return image_hash


def _pack(entry: Entry) -> bytes:
    return b"".join((_LENGTH.pack(len(entry.document)), entry.document, entry.image or b""))


def _unpack(payload: bytes) -> Entry:
    start = _LENGTH.size
    (length,) = _LENGTH.unpack_from(payload)
    return Entry(payload[start : start + length], payload[start + length :] or None)
