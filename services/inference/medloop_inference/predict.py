"""The way to the network: in from the event loop, out to it again, and every answer recorded on the way.

`Predictor` is what all protocols ask. Every image stands for itself: one that cannot be read becomes its own error, and
the others of its request are answered.
"""

import asyncio
import hashlib
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import anyio
import anyio.to_thread
import numpy as np
from medloop.auth import principal
from medloop.bundle import Pixels
from medloop.errors import InvalidRequest, MedLoopError
from medloop.log import request_id
from medloop.vision.dicom_reader import DicomReader

from medloop_inference.admission import Admission, Pace
from medloop_inference.answer import Answer, Options, with_activation
from medloop_inference.batcher import Asker, Batcher, Item, Outcome, Settled, Ticket, Watch
from medloop_inference.champion import Served
from medloop_inference.settings import QueueSettings

__all__ = ["Answer", "Options", "Predictor"]

logger = logging.getLogger(__name__)

WINDOW = 32
"""Images of one request that wait at once, so that a large request does not hold up everybody else's."""
_NOBODY = Options()


class Sink(Protocol):
    """Told every outcome before its caller is, from a lane's thread; `offered` afterwards."""

    def settled(self, settled: Settled) -> None: ...
    def delivered(self, settled: Settled) -> None: ...


class Predictor:
    """Answers for images with what `served` returns at the time (it raises NoModel while there is nothing).

    `lanes` threads decode, and take up to `runs` batches through the network at once. `stored` says whether images are
    kept, which each answer then states.
    """

    def __init__(
        self,
        served: Callable[[], Served],
        queue: QueueSettings,
        *,
        lanes: int,
        runs: int = 1,
        dicom: DicomReader,
        watch: Watch,
        sink: Sink,
        stored: bool = False,
    ) -> None:
        self._served, self._sink, self._stored = served, sink, stored
        self.admission = Admission(queue)
        self._batcher = Batcher(lanes, runs, self.admission, Pace(queue.target_ms), dicom, watch, self._settle)
        self._drawing = anyio.CapacityLimiter(lanes)
        self._submitted: list[Item] = []  # in this turn of the event loop
        self._thread = 0  # the event loop's

    def start(self) -> None:
        self._batcher.start()

    def stop(self, timeout: float = 10.0) -> None:
        """Answer what was accepted, then end."""
        self._batcher.stop(timeout)

    @property
    def pace_limit(self) -> int:
        """Images of the largest batch now."""
        return self._batcher.pace.limit

    @property
    def busy(self) -> bool:
        return self._batcher.busy

    async def predict(self, image: bytes, options: Options = _NOBODY) -> Answer:
        """The answer to one encoded image.

        Raises NoModel, Overloaded, DeadlineExceeded, InvalidImage, UnsupportedImage or ImageTooLarge.
        """
        (outcome,) = await self.predict_many((image,), options)
        if isinstance(outcome, MedLoopError):
            raise outcome
        return outcome

    async def predict_many(self, images: Sequence[bytes], options: Options = _NOBODY) -> list[Answer | MedLoopError]:
        """For each encoded image, in order, its answer or its own error; all answers come from one model.

        Raises NoModel and Overloaded, before anything was done.
        """
        served, asker = self._served(), _asker()

        def item(number: int, ticket: Ticket, index: int) -> Item:
            image = images[number]
            return Item(served, options, ticket, index, image, size=len(image), asker=asker, stored=self._stored)

        return await self._ask([len(image) for image in images], item)

    async def predict_pixels(self, pixels: Pixels, options: Options = _NOBODY) -> list[Answer | MedLoopError]:
        """The answers to `pixels` uint8 [N, S, S, C], N ≥ 1, prepared already as the bundle's card says; the image's
        hash is that of the pixels. Raises InvalidRequest for another shape, NoModel and Overloaded."""
        served = self._served()
        spec = served.bundle.card.preparation
        expected = (spec.size, spec.size, spec.channels)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != expected or not len(pixels):
            raise InvalidRequest(f"Prepared images must be uint8 [N, {', '.join(map(str, expected))}] with N ≥ 1.")
        asker = _asker()

        def item(number: int, ticket: Ticket, index: int) -> Item:
            one = pixels[number]
            return Item(served, options, ticket, index, b"", one, size=one.nbytes, asker=asker, image_hash=_hash(one))

        return await self._ask([one.nbytes for one in pixels], item)

    async def _ask(self, sizes: Sequence[int], item: Callable[[int, Ticket, int], Item]) -> list[Outcome]:
        """The outcomes of images of `sizes` bytes; `item(number, ticket, index)` makes each."""
        self.admission.check()
        self.admission.hold(sum(sizes))
        submitted = 0
        try:
            outcomes: list[Outcome] = []
            while submitted < len(sizes):
                numbers = range(submitted, min(submitted + WINDOW, len(sizes)))
                ticket = Ticket(asyncio.get_running_loop().create_future(), len(numbers))
                items = [item(number, ticket, index) for index, number in enumerate(numbers)]
                submitted = numbers.stop
                outcomes += await self._through(items)
            return outcomes
        finally:
            # What was submitted is released when it is settled: whoever left, it lies in the queue until then.
            self.admission.release(sum(sizes[submitted:]))

    async def _through(self, items: list[Item]) -> list[Outcome]:
        """Submit the items of one ticket and wait for all of them."""
        ticket = items[0].ticket
        if not self._submitted:
            # What arrives in one turn of the event loop goes to the lanes together, and wakes one of them once.
            ticket.future.get_loop().call_soon(self._flush)
        self._submitted += items
        self.admission.images += len(items)
        await ticket.future
        outcomes = [ticket.outcomes[index] for index in range(len(items))]
        if not items[0].options.cam:
            return outcomes
        return [await self._drawn(item, outcome) for item, outcome in zip(items, outcomes, strict=True)]

    async def _drawn(self, item: Item, outcome: Outcome) -> Outcome:
        if isinstance(outcome, MedLoopError) or item.pixels is None:
            return outcome
        return await anyio.to_thread.run_sync(with_activation, outcome, item.pixels, limiter=self._drawing)

    def _flush(self) -> None:
        items, self._submitted = self._submitted, []
        self._thread = threading.get_ident()
        room = self._batcher.room_here
        if not room:
            self._batcher.submit(items)
            return
        if len(items) > room:
            self._submitted = items[room:]
            asyncio.get_running_loop().call_soon(self._flush)
        self._batcher.answer_here(items[:room])

    def _settle(self, settled: Settled) -> None:
        """In a lane's thread, or the event loop's: record first, so that no answer is out that a kill could make
        unheard of; then tell."""
        self._tell_sink(self._sink.settled, settled)
        loop = settled[0][0].ticket.future.get_loop()
        try:
            if threading.get_ident() == self._thread:
                self._deliver(settled)
            else:
                loop.call_soon_threadsafe(self._deliver, settled)
        except RuntimeError:  # the loop is closed: the service ended, and its callers with it
            logger.warning("%d answers were ready after the service had stopped", len(settled))
        self._tell_sink(self._sink.delivered, settled)

    def _tell_sink(self, tell: Callable[[Settled], None], settled: Settled) -> None:
        try:
            tell(settled)
        except Exception:
            # A defect in what is done beside answering must not keep anybody's answer.
            logger.exception("answers could not be noted")

    def _deliver(self, settled: Settled) -> None:
        self.admission.images -= len(settled)
        for item, outcome in settled:
            self.admission.release(item.size)
            ticket = item.ticket
            ticket.outcomes[item.index] = outcome
            ticket.missing -= 1
            if not ticket.missing and not ticket.future.done():
                ticket.future.set_result(None)


def _asker() -> Asker:
    who = principal.get()
    return Asker(request_id.get(), who.effective if who is not None and who.authenticated else None)


def _hash(pixels: Pixels) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()
