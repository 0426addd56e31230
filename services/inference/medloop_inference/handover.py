"""Handing over: what a replica could not record before it ended lies in objects until another one records it.

The disk of a container may end with it, objects do not. An object holds frames, as the spool does, with the images
freed of metadata, and is named by who left it and by the SHA-256 of its bytes. It is deleted once records have all of
it: a replica that ends meanwhile, or two that do the same at once, change nothing, since records are put once.
"""

import hashlib
import logging
import random
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from medloop.errors import MedLoopError, NotFound, ObjectTooLarge
from medloop.storage.objects import ObjectStore
from medloop.storage.records import RecordStore
from medloop.vision.decode import DEFAULT_LIMITS

from medloop_inference.delivery import BATCH, Delivery, without_metadata
from medloop_inference.frames import join_frames, parse_frames

logger = logging.getLogger(__name__)

PREFIX = "spool/"
ASIDE = "spool-aside/"
"""Where an object is kept for people of which a part is damaged, or cannot be recorded."""
_NAME = re.compile(rf"{PREFIX}(?P<place>(?P<replica>r-[A-Za-z0-9._-]+)/(?P<digest>[0-9a-f]{{64}})\.frames)")
_OBJECT_BYTES = 4 * 2**20
"""An object that has grown to this is closed, so that whoever takes it needs little memory."""
_TAKEN_BYTES = _OBJECT_BYTES + 4 * DEFAULT_LIMITS.max_pixels
"""A larger one is none of ours, and stays where it is: it would take the memory that answers need. Ours hold one
prediction beyond `_OBJECT_BYTES` at most, whose image has three bytes a pixel where it had to be written anew."""
_MOST = 1000
"""Objects that are looked at together."""


class Handover:
    """The way into objects. `replica` names who leaves something there: by default, this machine."""

    def __init__(self, objects: ObjectStore, replica: str | None = None) -> None:
        self._objects = objects
        # A name that objects take, whatever this machine is called.
        self._replica = "r-" + re.sub(r"[^A-Za-z0-9._-]", "_", replica or socket.gethostname())

    def put(self, payloads: Sequence[bytes], end: float) -> bool:
        """Store all of it durably; False where `end` (on the clock of `time.monotonic`) came first, and any part of it
        may be stored. Raises StorageUnavailable and StorageFull."""
        for data in _objects_of(payloads):
            if time.monotonic() >= end:
                return False
            digest = hashlib.sha256(data).hexdigest()
            self._objects.put_if_absent(f"{PREFIX}{self._replica}/{digest}.frames", data)
        return True


def _objects_of(payloads: Sequence[bytes]) -> Iterator[bytes]:
    """The payloads in frames, without metadata, in pieces of a bounded size."""
    part: list[bytes] = []
    size = 0
    for payload in payloads:
        part.append(without_metadata(payload))
        size += len(part[-1])
        if size >= _OBJECT_BYTES:
            yield join_frames(part)
            part, size = [], 0
    if part:
        yield join_frames(part)


class Collector:
    """The way out: records what replicas left in objects, until `stopping`.

    `waiting` says how many objects lay there at the last look. Since the start are counted: predictions that were
    `recorded` and `refused`, and objects of which a part was `damaged`. The latter two are kept aside; what is too
    large to have been left by a replica counts as damaged, and stays.
    """

    def __init__(self, records: RecordStore, objects: ObjectStore, stopping: Callable[[], bool]) -> None:
        self._records, self._objects, self._stopping = records, objects, stopping
        self._problem: str | None = None
        self._left: set[str] = set()
        self.waiting = self.recorded = self.refused = self.damaged = 0

    def collect_once(self) -> None:
        """Look once, and record all that is there; what is in the way is told in the log, once."""
        try:
            self._collect()
        except MedLoopError as exc:
            problem: str | None = exc.detail
        else:
            problem = None
        if (problem is None) != (self._problem is None):
            logger.warning("what replicas left in objects: %s", problem or "recorded again")
        self._problem = problem

    def _collect(self) -> None:
        found = (_NAME.fullmatch(key) for key in self._objects.list(PREFIX) if key not in self._left)
        names = list(islice((name for name in found if name is not None), _MOST))
        self.waiting = len(names)
        if not names:
            return
        self._records.ping()  # before anything large is fetched for nothing
        random.shuffle(names)  # replicas start at different ones, and a bad one does not for ever stand before the rest
        for name in names:
            if not self._stopping() and self._take(name):
                self.waiting -= 1

    def _take(self, name: re.Match[str]) -> bool:
        """Record one object and delete it; False where it was not finished."""
        key = name.group()
        try:
            data = self._objects.get(key, at_most=_TAKEN_BYTES)
        except NotFound:
            return True  # another replica was faster
        except ObjectTooLarge as exc:
            self._leave(key, exc.detail)
            return True
        parsed = parse_frames(data)
        refused: list[bytes] = []
        delivery = Delivery(self._records, self._objects, refused.append)
        for start in range(0, len(parsed.payloads), BATCH):
            if self._stopping():
                return False
            delivery.deliver(parsed.payloads[start : start + BATCH])
        damaged = parsed.torn or parsed.damaged or hashlib.sha256(data).hexdigest() != name["digest"]
        if damaged or refused:
            self._objects.put(ASIDE + name["place"], data)
            logger.error("a part of %s cannot be recorded; it is kept as %s", key, ASIDE + name["place"])
        self._objects.delete(key)
        self.recorded += len(parsed.payloads) - len(refused)
        self.refused += len(refused)
        self.damaged += damaged
        logger.info("recorded %d predictions that %s left", len(parsed.payloads) - len(refused), name["replica"])
        return True

    def _leave(self, key: str, why: str) -> None:
        self._left.add(key)
        self.damaged += 1
        logger.error("%s It is left there; see who put it, and delete it.", why)
