"""From bytes to an answer: decode and prepare in threads, run the network, say how sure it is.

`Predictor` is the only way to the network. Every item stands for itself: one that cannot be decoded becomes its own
error, and the others of its request are answered.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import anyio
import anyio.to_thread
import numpy as np
from medloop.bundle import Outputs, Pixels, prediction_set
from medloop.errors import MedLoopError
from medloop.schemas import Prediction
from medloop.vision.prepare import PreparationSpec, prepare

from medloop_inference.champion import Served

CHUNK = 32
"""Images of one request that go through the network together: beyond this a CPU gains little, and others wait."""

Seconds: TypeAlias = dict[str, float]
Observe: TypeAlias = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """One image on its way: `pixels` uint8 [S, S, C], the hash of what was sent, and the time decoding took."""

    pixels: Pixels
    image_hash: str
    decode_s: float


@dataclass(frozen=True, slots=True)
class _Ran:
    outputs: Outputs
    queue_s: float
    network_s: float


class Predictor:
    """Answers for images with whatever model it is handed.

    At most `decoders` images are decoded at once, and the network runs once at a time: ONNX Runtime spreads a single
    run over all cores. `observe` is told the seconds that each stage took.
    """

    def __init__(self, decoders: int, observe: Observe = lambda stage, seconds: None) -> None:
        self._decoding = anyio.CapacityLimiter(decoders)
        self._engine = anyio.CapacityLimiter(1)
        self._observe = observe

    async def predict(self, served: Served, image: bytes) -> Prediction:
        """The answer to one encoded image; raises InvalidImage, UnsupportedImage or ImageTooLarge."""
        (answer,) = await self.predict_many(served, [image])
        if isinstance(answer, MedLoopError):
            raise answer
        return answer

    async def predict_many(self, served: Served, images: Sequence[bytes]) -> list[Prediction | MedLoopError]:
        """For each encoded image, in order, its answer or its own error; all answers come from `served`."""
        answers: list[Prediction | MedLoopError] = []
        for start in range(0, len(images), CHUNK):
            answers += await self._predict_chunk(served, images[start : start + CHUNK])
        return answers

    async def _predict_chunk(self, served: Served, images: Sequence[bytes]) -> list[Prediction | MedLoopError]:
        began = time.perf_counter()
        decoded = await self._decode_all(images, served.bundle.card.preparation)
        good = [item for item in decoded if isinstance(item, _Prepared)]
        if not good:
            return [item for item in decoded if isinstance(item, MedLoopError)]
        pixels = np.stack([item.pixels for item in good])  # uint8 [N, S, S, C]
        asked = time.perf_counter()
        ran = await anyio.to_thread.run_sync(_run, served, pixels, asked, limiter=self._engine)
        self._observe("queue", ran.queue_s)
        self._observe("network", ran.network_s)
        rows = iter(range(len(good)))
        return [
            item if isinstance(item, MedLoopError) else _answer(served, item, ran, next(rows), began)
            for item in decoded
        ]

    async def _decode_all(self, images: Sequence[bytes], spec: PreparationSpec) -> list[_Prepared | MedLoopError]:
        decoded: dict[int, _Prepared | MedLoopError] = {}

        async def decode(index: int) -> None:
            decoded[index] = await anyio.to_thread.run_sync(_decode, images[index], spec, limiter=self._decoding)

        async with anyio.create_task_group() as tasks:
            for index in range(len(images)):
                tasks.start_soon(decode, index)
        for item in decoded.values():
            if isinstance(item, _Prepared):
                self._observe("decode", item.decode_s)
        return [decoded[index] for index in range(len(images))]


def _decode(image: bytes, spec: PreparationSpec) -> _Prepared | MedLoopError:
    started = time.perf_counter()
    try:
        pixels = prepare(image, spec)
    except MedLoopError as exc:
        return exc
    return _Prepared(pixels, hashlib.sha256(image).hexdigest(), time.perf_counter() - started)


def _run(served: Served, pixels: Pixels, asked: float) -> _Ran:
    started = time.perf_counter()
    outputs = served.network.run(pixels)
    return _Ran(outputs, started - asked, time.perf_counter() - started)


def _answer(served: Served, item: _Prepared, ran: _Ran, row: int, began: float) -> Prediction:
    card = served.bundle.card
    probabilities = ran.outputs.probabilities[row]  # f32 [K]
    seconds: Seconds = {
        "decode": item.decode_s,
        "queue": ran.queue_s,
        "network": ran.network_s,
        "total": time.perf_counter() - began,
    }
    return Prediction(
        model=served.ref,
        image_hash=item.image_hash,
        label=card.classes[int(probabilities.argmax())],
        probabilities=dict(zip(card.classes, map(float, probabilities), strict=True)),
        prediction_set=prediction_set(probabilities, card),
        coverage=card.conformal.coverage,
        milliseconds={stage: round(taken * 1000, 3) for stage, taken in seconds.items()},
    )
