"""From encoded images to the network's outputs: decoding beside the network, which never idles.

What costs less than changing threads is answered by the event loop's own thread, some milliseconds' worth at a time.
All else goes to lanes, threads of which each does both jobs. A lane decodes what is queued for a millisecond or so,
adds it to what is ready, and, if the network has room, takes what is ready through it as one batch. So a lone image
pays for one change of threads in each direction, and under load batches form by themselves out of what arrived while
the last one ran: nothing ever waits for a batch to fill. Large images and DICOM are decoded in slow lanes of their own
and hold up nobody else.
"""

import asyncio
import hashlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias, cast

import numpy as np
from medloop.bundle import Outputs, Pixels
from medloop.errors import DeadlineExceeded, ImageTooLarge, InvalidImage, MedLoopError, Overloaded, Unavailable
from medloop.vision.decode import Limits
from medloop.vision.dicom import is_dicom
from medloop.vision.dicom_reader import DicomReader
from medloop.vision.encode import encode_png_canonical
from medloop.vision.prepare import prepare, prepare_pixels
from numpy.typing import NDArray

from medloop_inference.admission import Admission, Pace
from medloop_inference.answer import Answer, Asked, Options
from medloop_inference.champion import Served

logger = logging.getLogger(__name__)

SLICE_S = 0.0015
"""How long a lane decodes before it looks at the network: short beside any answer, long beside a change of threads."""
SMALL = Limits(max_pixels=1_000_000, max_bytes=2 * 2**20)
"""What a quick lane decodes (tens of milliseconds at most); larger images go to the slow lanes."""
LIGHT = Limits(max_pixels=2**16, max_bytes=2**15)
"""What the event loop's thread decodes (a millisecond or two at most)."""
LIGHT_S = 0.001
"""Processor time of an image, decoding and network, up to which it is answered there: most of that is the
interpreter's work, which only one thread does at a time, so that other threads would wait and not help."""
TURN_S = 0.004
"""How long that may take before others have their turn of the event loop."""
QUIET_S = 0.005
"""Without a batch for so long, nobody is expected."""
SLOW_LANES = 2
SLOW_IMAGES = 64
"""Images that the slow lanes decode or keep waiting: two requests with as many as go through at once. More of them
would wait too long anyway."""

Outcome: TypeAlias = Answer | MedLoopError
Released: TypeAlias = Literal["full", "all-ready"]
Work: TypeAlias = Literal["decode", "network"]


class Watch(Protocol):
    """Told what happens, from the lanes' threads."""

    def batch(self, size: int, why: Released, seconds: float) -> None: ...
    def stage(self, stage: str, seconds: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks, for the record: the request's id, and the name of an authenticated caller."""

    request_id: str | None = None
    name: str | None = None


NOBODY = Asker()


@dataclass(slots=True, eq=False)
class Ticket:
    """Somebody who waits for `missing` outcomes; but for `future.cancelled()` the event loop's thread's alone."""

    future: "asyncio.Future[None]"
    missing: int
    outcomes: dict[int, Outcome] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Item:
    """One image on its way through, number `index` of its ticket; `pixels` uint8 [S, S, C] are set once it is prepared.
    Times are seconds on the clock of `time.monotonic`."""

    served: Served
    options: Options
    ticket: Ticket
    index: int
    image: bytes
    pixels: Pixels | None = None
    size: int = 0  # bytes that are held for it
    asker: Asker = NOBODY
    stored: bool = False
    accepted: float = field(default_factory=time.monotonic)
    image_hash: str = ""
    warnings: tuple[str, ...] = ()
    slow: bool = False  # decoded in a slow lane
    is_dicom: bool = False
    ready: float = 0.0
    decode_s: float = 0.0
    plain: bytes | None = None  # what is stored in place of a DICOM file, which is full of names


Settled: TypeAlias = list[tuple[Item, Outcome]]


@dataclass(slots=True)
class _Decoded:
    """What came of a chunk; `beyond` are those that the limits leave to others."""

    ready: list[Item] = field(default_factory=list)
    beyond: list[Item] = field(default_factory=list)
    refused: Settled = field(default_factory=list)


class Batcher:
    """Takes items through decoding and network; `settle` is told their outcomes, batch by batch, from a lane's thread.

    `lanes` is the number of cores to use, `runs` how many batches may be in the network at once. Items of one batch
    share a model: one that is swapped in meanwhile answers what was submitted after.
    """

    def __init__(
        self,
        lanes: int,
        runs: int,
        admission: Admission,
        pace: Pace,
        dicom: DicomReader,
        watch: Watch,
        settle: Callable[[Settled], None],
    ) -> None:
        self.pace, self._runs = pace, runs
        self._admission, self._dicom, self._watch, self._tell = admission, dicom, watch, settle
        self._lock = threading.Lock()  # guards all that follows
        self._work, self._slow_work = threading.Condition(self._lock), threading.Condition(self._lock)
        self._queued: deque[Item] = deque()  # to be decoded
        self._large: deque[Item] = deque()  # to be decoded in a slow lane
        self._ready: deque[Item] = deque()
        self._running = 0  # lanes at the network
        self._open = 0  # submitted and not settled
        self._idle = 0  # quick lanes that wait
        self._stopping = False
        self._decode_s = SLICE_S / 4  # moving average of one image
        self._last_ended = 0.0  # when the network last had nothing to do or ended a batch
        self._network_s = SLICE_S  # moving average of one image
        # Moving averages of one image's processor time; some dozens of batches show that a network is light.
        self._costs_s: dict[Work, float] = {"decode": 0.0, "network": 0.01}
        quick = [threading.Thread(target=self._quick_lane, name=f"lane-{i}", daemon=True) for i in range(lanes)]
        slow = [threading.Thread(target=self._slow_lane, name=f"slow-{i}", daemon=True) for i in range(SLOW_LANES)]
        self._threads = quick + slow

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, timeout: float = 10.0) -> None:
        """Finish what was submitted, then end; what is left after `timeout` seconds is abandoned."""
        with self._lock:
            self._stopping = True
            self._wake_all()
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    @property
    def busy(self) -> bool:
        """Whether somebody waits for an answer, or will so soon: who was answered in the event loop's thread a moment
        ago is asked after in the next."""
        return self._open > 0 or time.monotonic() - self._last_ended < QUIET_S

    def submit(self, items: Sequence[Item]) -> None:
        with self._lock:
            self._open += len(items)
            for item in items:
                (self._queued if item.pixels is None else self._ready).append(item)
            self._wake()

    @property
    def room_here(self) -> int:
        """How many images the event loop's thread may answer in one turn; none while they are not light."""
        cost = sum(self._costs_s.values())
        return 0 if cost >= LIGHT_S else max(1, int(TURN_S / cost))

    def answer_here(self, items: Sequence[Item]) -> None:
        """Answer in this thread, but for what is not light after all: that goes to the lanes."""
        with self._lock:
            self._open += len(items)
        ready = [item for item in items if item.pixels is not None]

        def decode(chunk: list[Item]) -> Settled:
            decoded = self._decode(chunk, LIGHT)
            ready.extend(decoded.ready)
            with self._lock:
                self._queued.extend(decoded.beyond)
                self._wake()
            return decoded.refused

        if encoded := [item for item in items if item.pixels is None]:
            self._safely("decode", decode, encoded)
        while ready:
            batch = [item for item in ready if item.served is ready[0].served][: self.pace.limit]
            ready = [item for item in ready if item not in batch]
            with self._lock:
                self._running += 1
            self._safely("network", self._run_batch, batch)

    def _settle(self, settled: Settled) -> None:
        if not settled:
            return
        self._tell(settled)
        with self._lock:
            self._open -= len(settled)
            if self._stopping and not self._open:
                self._wake_all()

    def _wake(self) -> None:
        """Wake an idle lane, if there is one, for what waits; it counts as busy from here on."""
        if self._idle and (self._queued or self._may_run()):
            self._idle -= 1
            self._work.notify()

    def _wake_all(self) -> None:
        self._idle = 0
        self._work.notify_all()
        self._slow_work.notify_all()

    # The quick lanes.

    def _quick_lane(self) -> None:
        while True:
            with self._lock:
                while not self._queued and not self._may_run():
                    if self._stopping and not self._open:
                        return
                    self._idle += 1
                    self._work.wait()
                batch = self._take_batch() if self._may_run() else []
                chunk = [] if batch else self._take_chunk()
                self._wake()
            if chunk:
                self._safely("decode", self._decode_chunk, chunk)
            else:
                self._safely("network", self._run_batch, batch)

    def _safely(self, work: Work | None, do: Callable[[list[Item]], Settled], items: list[Item]) -> None:
        """Whatever goes wrong, every item is settled and the lane lives: it is what everybody else waits for. What it
        cost an image is learnt as that of `work`."""
        began = time.thread_time()
        try:
            settled = do(items)
        except Exception:
            logger.exception("a lane failed")
            unexpected = MedLoopError("An unexpected error occurred; the service's log says more.")
            settled = [(item, unexpected) for item in items]
        self._settle(settled)
        if work is None:
            return
        cost = (time.thread_time() - began) / len(items)
        with self._lock:
            self._costs_s[work] += 0.1 * (cost - self._costs_s[work])

    def _may_run(self) -> bool:
        """Whether a lane should go to the network. While another is there already, decoding comes first, as long as
        there is something to decode for the batch: larger batches cost less an image."""
        if not self._ready or self._running >= self._runs:
            return False
        return not (self._running and self._queued and len(self._ready) < self.pace.limit)

    def _take_batch(self) -> list[Item]:
        """What this lane takes through the network: images for one model, up to the pace's limit, and no more than its
        share while others are idle, unless that would be less than a slice of work."""
        share = math.ceil(len(self._ready) / (1 + min(self._idle, self._runs - self._running - 1)))
        size = min(self.pace.limit, max(share, int(SLICE_S / self._network_s)))
        batch: list[Item] = []
        while self._ready and len(batch) < size and (not batch or self._ready[0].served is batch[0].served):
            batch.append(self._ready.popleft())
        self._running += 1
        return batch

    def _take_chunk(self) -> list[Item]:
        """As many queued images as a slice of decoding is likely to be enough for."""
        size = max(1, min(len(self._queued), self.pace.limit, int(SLICE_S / self._decode_s)))
        return [self._queued.popleft() for _ in range(min(size, len(self._queued)))]

    def _decode_chunk(self, chunk: list[Item]) -> Settled:
        decoded = self._decode(chunk, SMALL)
        large = decoded.beyond
        with self._lock:
            for item in decoded.ready:
                self._decode_s += 0.1 * (item.decode_s - self._decode_s)
            self._ready.extend(decoded.ready)
            room = SLOW_IMAGES - self._admission.slow
            for item in large[:room]:
                item.slow = True
                self._large.append(item)
                self._slow_work.notify()
            self._admission.slow += len(large[:room])
        return decoded.refused + [(item, _too_many_large()) for item in large[room:]]

    def _decode(self, chunk: list[Item], limits: Limits) -> "_Decoded":
        decoded = _Decoded()
        for item in chunk:
            try:
                fits = not is_dicom(item.image) and self._prepare(item, limits)
            except MedLoopError as exc:
                decoded.refused.append((item, exc))
            else:
                (decoded.ready if fits else decoded.beyond).append(item)
        return decoded

    def _prepare(self, item: Item, limits: Limits | None) -> bool:
        """Decode and prepare; False when the image is larger than `limits` allow here."""
        if _is_late(item):
            raise _too_late()
        started = time.monotonic()
        try:
            spec = item.served.bundle.card.preparation
            item.pixels = prepare(item.image, spec, limits) if limits else prepare(item.image, spec)
        except ImageTooLarge:
            if limits is None:
                raise
            return False
        self._mark(item, started)
        return True

    def _mark(self, item: Item, started: float) -> None:
        item.image_hash = hashlib.sha256(item.image).hexdigest()
        item.ready = time.monotonic()
        item.decode_s = item.ready - started
        self._watch.stage("decode", item.decode_s)

    # The slow lanes.

    def _slow_lane(self) -> None:
        while True:
            with self._lock:
                while not self._large:
                    if self._stopping and not self._open:
                        return
                    self._slow_work.wait()
                item = self._large.popleft()
            self._safely(None, self._decode_large, [item])

    def _decode_large(self, items: list[Item]) -> Settled:
        (item,) = items
        try:
            if is_dicom(item.image):
                self._prepare_dicom(item)
            else:
                self._prepare(item, None)
        except MedLoopError as exc:
            return [(item, exc)]
        finally:
            with self._lock:
                self._admission.slow -= 1
        with self._lock:
            self._ready.append(item)
            self._wake()
        return []

    def _prepare_dicom(self, item: Item) -> None:
        if _is_late(item):
            raise _too_late()
        started = time.monotonic()
        item.is_dicom = True
        read = self._dicom.read(item.image, item.options.frame)
        item.pixels = prepare_pixels(read.pixels, item.served.bundle.card.preparation)
        item.warnings = tuple(read.warnings)
        if item.stored:
            item.plain = encode_png_canonical(read.pixels)
        self._mark(item, started)

    # At the network.

    def _run_batch(self, batch: list[Item]) -> Settled:
        why: Released = "full" if len(batch) >= self.pace.limit else "all-ready"
        started = time.monotonic()
        late = {item for item in batch if _is_late(item)}
        settled: Settled = [(item, _too_late()) for item in late]
        waiting = [item for item in batch if item not in late]
        try:
            if waiting:
                settled += self._answered(waiting, started)
        finally:
            with self._lock:
                self._running -= 1
                self._wake()
        if waiting:
            self._learn(waiting, why, started)
        return settled

    def _learn(self, batch: list[Item], why: Released, started: float) -> None:
        ended = time.monotonic()
        with self._lock:
            self._network_s += 0.1 * ((ended - started) / len(batch) - self._network_s)
            # Saturated, a batch costs the time since the last one ended; otherwise since its first image came. How long
            # the slow lanes took says nothing about what others have to wait for.
            since = max(self._last_ended, min(item.ready if item.slow else item.accepted for item in batch))
            self._last_ended = ended
            self._admission.ran(len(batch), ended - since)
            self.pace.ran(len(batch), ended - started)
            self.pace.observe([ended - item.accepted for item in batch if not item.slow])
        self._watch.batch(len(batch), why, ended - started)

    def _answered(self, batch: list[Item], started: float) -> Settled:
        """The batch's answers. When the network fails on it, halves are tried, so that a bad item is alone at last."""
        try:
            outputs = batch[0].served.network.run(np.stack([cast(Pixels, item.pixels) for item in batch]))
        except Exception as exc:  # noqa: BLE001 - engines share no narrower base; told by `_why_it_failed`
            # One item must not take the others with it.
            if len(batch) > 1:
                half = len(batch) // 2
                return self._answered(batch[:half], started) + self._answered(batch[half:], started)
            return [(batch[0], _why_it_failed(batch[0], exc))]
        return self._composed(batch, outputs, started)

    def _composed(self, batch: list[Item], outputs: Outputs, started: float) -> Settled:
        finite: NDArray[np.bool_] = np.asarray(np.isfinite(outputs.probabilities).all(axis=1))
        if not finite.all():
            good = [item for item, fine in zip(batch, finite, strict=True) if fine]
            bad: Settled = [(item, _unanswerable()) for item, fine in zip(batch, finite, strict=True) if not fine]
            return bad + (self._composed(good, _rows(outputs, finite), started) if good else [])
        ended = time.monotonic()
        asked = []
        for item in batch:
            seconds = {
                "decode": item.decode_s,
                "queue": max(0.0, started - item.accepted - item.decode_s),
                "network": ended - started,
                "total": ended - item.accepted,
            }
            self._watch.stage("queue", seconds["queue"])
            frame = item.options.frame if item.is_dicom else None
            asked.append(Asked(item.image_hash, seconds, item.warnings, item.stored, item.options.cam, frame))
        return list(zip(batch, batch[0].served.composer.compose(asked, outputs), strict=True))


def _is_late(item: Item) -> bool:
    """Whether nobody waits any more."""
    if item.ticket.future.cancelled():
        return True
    return item.options.deadline is not None and time.monotonic() > item.options.deadline


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("The time that X-Request-Timeout-Ms allows ran out while this waited; send it again later.")


def _too_many_large() -> Overloaded:
    return Overloaded(f"{SLOW_IMAGES} large images or DICOM files are being decoded already; send this again later.")


def _why_it_failed(item: Item, error: Exception) -> MedLoopError:
    """Whose fault it was that the network failed on one image alone: a blank one must go through a sound network."""
    spec = item.served.bundle.card.preparation
    try:
        item.served.network.run(np.zeros((1, spec.size, spec.size, spec.channels), np.uint8))
    except Exception:  # as above
        logger.exception("the network fails on every image")
        return Unavailable("The model cannot answer at the moment; the service's log says more.")
    logger.warning("the network failed on one image: %s", error)
    return _unanswerable()


def _unanswerable() -> InvalidImage:
    return InvalidImage("The model has no answer to this image: send the original file, or another one.")


def _rows(outputs: Outputs, chosen: NDArray[np.bool_]) -> Outputs:
    cam = None if outputs.cam is None else outputs.cam[chosen]
    return Outputs(outputs.probabilities[chosen], outputs.embedding[chosen], cam)
