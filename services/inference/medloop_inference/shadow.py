"""The challenger, asked beside the champion: a sampled share of the images that were answered is shown to it, too.

Nobody gets its answers, so it needs no approval, and nothing that goes wrong with it touches an answer. It runs after
everybody else: in one thread of low priority, on one core, at moments when nobody waits. Where it names another label
than the champion did, a record of kind `disagreements` says so.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from medloop import schemas
from medloop.bundle import Pixels
from medloop.engines import Network
from medloop.errors import MedLoopError, TrackingUnavailable, UntrustedModel
from medloop.registry import CHALLENGER, CHAMPION, Registry, fetch_bundle
from medloop.schemas import ModelRef
from medloop.settings import HomeSettings
from medloop.storage.records import RecordStore
from medloop.vision.prepare import PreparationSpec, prepare

from medloop_inference.background import Periodic, yield_processor
from medloop_inference.champion import RECHECK_SECONDS
from medloop_inference.disagreements import FLUSH_SECONDS, Diary, compare
from medloop_inference.loading import Wanted, open_wanted, reference

logger = logging.getLogger(__name__)

CAPACITY, CAPACITY_BYTES = 4, 16 * 2**20
"""Images that may wait for the challenger: it shows how it does on a sample, so a missed one costs little."""
PATIENCE_SECONDS = 0.5
"""How long an image waits for a moment in which nobody else does."""
_LOOK_SECONDS = 0.01


@dataclass(slots=True, eq=False)
class _Challenger:
    """A loaded challenger and how it does."""

    ref: ModelRef
    network: Network
    compared: int = 0
    disagreements: int = 0
    skipped: int = 0

    @property
    def preparation(self) -> PreparationSpec:
        return self.network.bundle.card.preparation


@dataclass(frozen=True, slots=True)
class _Item:
    """An answered image on its way to `challenger`: `pixels` uint8 [S, S, C] if the champion's fit, else `image`."""

    challenger: _Challenger
    prediction: Mapping[str, Any]
    image: bytes
    pixels: Pixels | None


class Shadow:
    """Shows `share`, in (0, 1], of the answered images to the challenger of `model`.

    `busy` says whether somebody waits for an answer. The challenger is one network more in memory.
    """

    def __init__(
        self,
        model: str,
        registry: Registry,
        home: HomeSettings,
        records: RecordStore,
        *,
        share: float,
        busy: Callable[[], bool],
        poll_seconds: float = 10.0,
        flush_seconds: float = FLUSH_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model, self._registry, self._bundles_dir = model, registry, home.bundles_dir
        self._share, self._busy, self._clock = share, busy, clock
        self._challenger: _Challenger | None = None
        self._refused: tuple[str, float] | None = None  # a version, and until when it is not looked at again
        self._problem: str | None = None
        self._diary, self._flush_seconds = Diary(records, flush_seconds), flush_seconds
        self._changed = threading.Condition()  # guards what follows, and all counting
        self._waiting: deque[_Item] = deque()
        self._waiting_bytes = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)
        self._watching = Periodic("challenger watcher", self.poll_once, poll_seconds, yielding=True)

    def start(self) -> None:
        self._watching.start()
        self._thread.start()

    def begin_stop(self) -> None:
        """Let go what still waits to be compared, and begin to write the disagreements that are known."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._watching.begin_stop()

    def stop(self, timeout: float = 5.0) -> None:
        """Let go what still waits to be compared, and wait up to `timeout` seconds until the known disagreements are
        written. The watcher is not waited for: it may be loading a network, and nothing is lost with it."""
        self.begin_stop()
        self._thread.join(timeout)

    def describe(self) -> schemas.Shadow:
        challenger = self._challenger
        return schemas.Shadow(
            model=challenger.ref if challenger else None,
            share=self._share,
            compared=challenger.compared if challenger else 0,
            disagreements=challenger.disagreements if challenger else 0,
            skipped=challenger.skipped if challenger else 0,
            problem=self._problem or self._diary.problem,
        )

    def offer(
        self,
        prediction: Mapping[str, Any],
        image: bytes,
        pixels: Pixels | None = None,
        preparation: PreparationSpec | None = None,
    ) -> None:
        """Take an answer that was given (the fields of `schemas.Prediction`) and its encoded image; never waits.

        `pixels` uint8 [S, S, C], prepared as `preparation` says, spare the challenger its own preparation if it wants
        the same. Without a fitting one of the two the image is passed over.
        """
        challenger = self._challenger
        if challenger is None or not is_sampled(prediction["image_hash"], self._share):
            return
        if prediction["model"]["version"] == challenger.ref.version:
            return  # the challenger became the champion: nothing to compare
        fitting = pixels if preparation == challenger.preparation else None
        if fitting is None and not image:
            return
        item = _Item(challenger, prediction, b"" if fitting is not None else image, fitting)
        with self._changed:
            if len(self._waiting) >= CAPACITY or self._waiting_bytes + len(item.image) > CAPACITY_BYTES:
                challenger.skipped += 1
                return
            self._waiting.append(item)
            self._waiting_bytes += len(item.image)
            self._changed.notify()

    # Which version it is.

    def poll_once(self) -> None:
        """Look at the challenger alias once and follow it."""
        try:
            state = self._registry.state(self._model)
        except TrackingUnavailable:
            return  # the watcher of the champion says so; what is loaded goes on
        version = state.aliases.get(CHALLENGER) if state else None
        if state is None or version is None or version == state.aliases.get(CHAMPION):
            self._challenger = self._problem = self._refused = None
        elif not self._is_known(version):
            self._follow(version)

    def _is_known(self, version: str) -> bool:
        if self._challenger is not None:
            return self._challenger.ref.version == version
        return self._refused is not None and self._refused[0] == version and self._clock() < self._refused[1]

    def _follow(self, version: str) -> None:
        self._challenger = self._problem = self._refused = None
        try:
            bundle = fetch_bundle(self._registry, self._registry.version(self._model, version), self._bundles_dir)
            network = open_wanted(bundle, version, Wanted(threads=1)).network
        except MedLoopError as exc:
            self._refused = (version, self._clock() + RECHECK_SECONDS)
            self._report(f"Version {version} cannot be shadowed: {exc.detail}")
        else:
            self._challenger = _Challenger(reference(self._model, version, network), network)
            logger.info("version %s is shown a share of %g of the images", version, self._share)

    def _report(self, problem: str) -> None:
        if problem != self._problem:
            logger.warning("shadow: %s", problem)
        self._problem = problem

    # What it says.

    def _run(self) -> None:
        yield_processor()
        while (item := self._take()) is not None or not self._stopping:
            try:
                if item is not None:
                    self._compare_when_idle(item)
                self._diary.write_if_due()
            except Exception:
                # Whatever goes wrong here goes wrong for nobody else, and the next image may fare better.
                logger.exception("the shadow failed on an image")
        self._diary.close()

    def _take(self) -> _Item | None:
        """The next image; None after a while without one, and at the end."""
        with self._changed:
            if not self._waiting and not self._stopping:
                self._changed.wait(self._flush_seconds)
            if not self._waiting or self._stopping:
                return None
            item = self._waiting.popleft()
            self._waiting_bytes -= len(item.image)
            return item

    def _compare_when_idle(self, item: _Item) -> None:
        patience_ends = time.monotonic() + PATIENCE_SECONDS
        while self._busy() and time.monotonic() < patience_ends and not self._stopping:
            time.sleep(_LOOK_SECONDS)
        challenger = item.challenger
        if challenger is not self._challenger:
            return
        answer = None if self._busy() else self._answer(item)
        found = compare(item.prediction, challenger.ref, answer) if answer else None
        with self._changed:
            challenger.compared += answer is not None
            challenger.skipped += answer is None
            challenger.disagreements += found is not None
        if found is not None:
            self._diary.add(found)

    def _answer(self, item: _Item) -> dict[str, float] | None:
        """The challenger's probability of each class; None where it cannot answer, and `describe` says why."""
        try:
            pixels = item.pixels if item.pixels is not None else prepare(item.image, item.challenger.preparation)
            answer = _probabilities(item.challenger.network, pixels)
        except MedLoopError as exc:
            self._report(f"The challenger cannot answer: {exc.detail}")
            return None
        self._problem = None
        return answer


def _probabilities(network: Network, pixels: Pixels) -> dict[str, float]:
    """Of each class, for uint8 [S, S, C]. Raises UntrustedModel when the network gives none."""
    try:
        probabilities = network.run(pixels[None]).probabilities[0]  # f32 [K]
    except Exception as exc:  # ONNX Runtime's own errors share no narrower base
        raise UntrustedModel(f"its network failed: {exc}") from exc
    if not np.isfinite(probabilities).all():
        raise UntrustedModel("its probabilities are no numbers.")
    return dict(zip(network.bundle.card.classes, probabilities.tolist(), strict=True))


def is_sampled(image_hash: str, share: float) -> bool:
    """Whether an image belongs to the sample: the same image always does or never, and a larger share only adds."""
    return int(image_hash[:16], 16) < share * 2**64
