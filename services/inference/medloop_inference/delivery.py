"""Delivery: from what was spooled of an answer to its record, and to its image in objects.

Whatever is delivered twice changes nothing, since records are put once by their id and images by their hash.
"""

import hashlib
import logging
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from medloop.errors import InvalidRequest
from medloop.storage.objects import ObjectStore
from medloop.storage.records import Encoded, RecordStore
from medloop.vision.encode import strip_metadata
from pydantic_core import to_json

logger = logging.getLogger(__name__)

KIND = "predictions"
BATCH = 200
"""Records put together: enough that a commit costs little, few enough that one batch takes well under a second."""
_LENGTH = struct.Struct("<I")
_NOT_STORED = {"image_stored": False}


@dataclass(frozen=True, slots=True)
class Entry:
    """What is to be recorded of one answer: the record as JSON (an object with a string `id`), and the encoded image
    where it is to be stored, in a format that `medloop.vision.encode.strip_metadata` takes (a frame of DICOM as
    canonical PNG). The record then gets `stored_image`, the hash that its object is named by."""

    document: bytes
    image: bytes | None = None


class Delivery:
    """Puts predictions (kind `predictions`) into `records` and their images into `objects`, used by one thread.

    What can never be a record is told in the log and given to `refuse`.
    """

    def __init__(self, records: RecordStore, objects: ObjectStore, refuse: Callable[[bytes], None]) -> None:
        self._records, self._objects, self._refuse_payload = records, objects, refuse
        self._ready: list[list[_Ready]] = []  # the batch in parts that records have yet to take

    def deliver(self, payloads: Sequence[bytes]) -> None:
        """Deliver a batch. After an error the same batch is to be given again: what was refused is not refused anew.

        Raises StorageUnavailable and StorageFull.
        """
        if not self._ready:
            self._ready = [self._prepare(payloads)]
        self._put()

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
        entry = unpack(payload)
        document = _parse(entry.document)
        if not isinstance(record_id := document.get("id"), str):
            raise InvalidRequest("The record of a prediction has no id.")
        if entry.image is None:
            return record_id, document
        return record_id, document | self._store(entry.image)

    def _store(self, image: bytes) -> dict[str, Any]:
        """Store the image; what its record then says about it."""
        stripped = _stripped(image)
        return _NOT_STORED if stripped is None else {"stored_image": store_image(self._objects, stripped)}

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
        self._refuse_payload(payload)


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


def pack(entry: Entry) -> bytes:
    """The entry as one payload."""
    return b"".join((_LENGTH.pack(len(entry.document)), entry.document, entry.image or b""))


def unpack(payload: bytes) -> Entry:
    """What `pack` made; raises InvalidRequest."""
    start = _LENGTH.size
    if len(payload) < start:
        raise InvalidRequest("The record of a prediction is cut short.")
    (length,) = _LENGTH.unpack_from(payload)
    return Entry(payload[start : start + length], payload[start + length :] or None)


def without_metadata(payload: bytes) -> bytes:
    """The same payload, fit to leave this machine: its image holds nothing but pixels, as those in objects do. Without
    the image where it cannot be read. Raises InvalidRequest for what `pack` did not make."""
    entry = unpack(payload)
    if entry.image is None:
        return payload
    stripped = _stripped(entry.image)
    return pack(Entry(_told(entry.document) if stripped is None else entry.document, stripped))


def _told(document: bytes) -> bytes:
    """The record of an answer whose image is not stored; what is no record stays what it is, to be refused later."""
    try:
        return to_json(_parse(document) | _NOT_STORED)
    except InvalidRequest:
        return document


def _parse(document: bytes) -> dict[str, Any]:
    try:
        return Encoded(document.decode())
    except ValueError as exc:
        raise InvalidRequest(f"The record of a prediction is not JSON: {exc}.") from exc


def _stripped(image: bytes) -> bytes | None:
    """The image without metadata; None where it cannot be read: it was answered, so its record must not be lost."""
    try:
        return strip_metadata(image)
    except InvalidRequest as exc:
        logger.error("the image of a prediction cannot be stored: %s", exc.detail)  # noqa: TRY400  no traceback helps
        return None
