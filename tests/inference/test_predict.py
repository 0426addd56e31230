"""Each answer belongs to its image, is what the network says, and does not depend on what else was asked."""

import asyncio
import hashlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from medloop.bundle import Bundle, Outputs, Pixels
from medloop.engines import Network
from medloop.errors import (
    DeadlineExceeded,
    InvalidImage,
    InvalidRequest,
    MedLoopError,
    NoModel,
    Overloaded,
    Unavailable,
)
from medloop.schemas import Approval, Prediction
from medloop.testing import tiny_bundle, tiny_outlier, tiny_probabilities
from medloop.vision.dicom import DicomImage
from medloop.vision.dicom_reader import DicomReader
from medloop.vision.encode import encode_png
from medloop_inference import batcher
from medloop_inference.answer import record_of
from medloop_inference.batcher import LIGHT, SLOW_IMAGES, SMALL, Settled
from medloop_inference.champion import Served, load
from medloop_inference.predict import WINDOW, Answer, Options, Predictor
from medloop_inference.settings import QueueSettings

pytestmark = pytest.mark.anyio
Grey = Callable[..., bytes]


def served_from(bundle: Bundle, version: str = "7") -> Served:
    approval = Approval(
        sequence=1,
        action="approve",
        model="tiny",
        version=version,
        bundle_digest=bundle.digest,
        decision_id="",
        approver="a",
        key_id="",
    )
    return load(bundle, approval)


class Ear:
    """Watch and sink: keeps what it is told."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, str]] = []
        self.stages: list[str] = []
        self.told: Settled = []

    def batch(self, size: int, why: str, seconds: float) -> None:
        self.batches.append((size, why))

    def stage(self, stage: str, seconds: float) -> None:
        self.stages.append(stage)

    def settled(self, settled: Settled) -> None:
        self.told += settled

    def delivered(self, settled: Settled) -> None:
        assert all(any(item is known for known, _ in self.told) for item, _ in settled)


class Slowed(Network):
    """The same network; each run waits for `gate`, and fails where a row's first pixel is `poison`."""

    engine = "onnxruntime"

    def __init__(self, network: Network, gate: threading.Event, poison: int = -1) -> None:
        super().__init__(network.bundle, network.precision, network.threads)
        self._network, self._gate, self._poison = network, gate, poison
        self.runs: list[int] = []
        self.now = self.most_at_once = 0

    def run(self, images: Pixels) -> Outputs:
        self.now += 1
        self.most_at_once = max(self.now, self.most_at_once)
        assert self._gate.wait(30)
        self.now -= 1
        self.runs.append(len(images))
        if (images[:, 0, 0, 0] == self._poison).any():
            raise RuntimeError("out of memory")
        return self._network.run(images)


@pytest.fixture(scope="session")
def served(first: Bundle) -> Served:
    return served_from(first)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def ear() -> Ear:
    return Ear()


@asynccontextmanager
async def predicting(
    ear: Ear,
    served: Served | Callable[[], Served],
    lanes: int = 2,
    runs: int = 1,
    reader: DicomReader | None = None,
    **limits: float,
) -> AsyncIterator[Predictor]:
    with reader or DicomReader() as dicom:
        predictor = Predictor(
            served if callable(served) else lambda: served,
            QueueSettings.model_validate({"target_ms": 10_000, **limits}),
            lanes=lanes,
            runs=runs,
            dicom=dicom,
            watch=ear,
            sink=ear,
        )
        predictor.start()
        try:
            yield predictor
        finally:
            predictor.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


def expected(level: int, **options: Any) -> Any:
    return tiny_probabilities(np.full((16, 16, 1), level, np.uint8), **options)


def given(answer: Answer | MedLoopError) -> Prediction:
    assert isinstance(answer, Answer)
    prediction = Prediction.model_validate(answer.document)
    assert prediction == Prediction.model_validate_json(answer.json)
    return prediction


@pytest.mark.parametrize("level", [0, 100, 255])
async def test_an_answer_is_what_the_network_says(ear: Ear, served: Served, grey: Grey, level: int) -> None:
    image = grey(level)
    async with predicting(ear, served) as predictor:
        answer = given(await predictor.predict(image))
    assert list(answer.probabilities.values()) == pytest.approx(expected(level), abs=1e-6)
    assert answer.label == ("bright" if level > 127 else "dark")
    assert answer.image_hash == hashlib.sha256(image).hexdigest()
    assert answer.model == served.ref
    assert (answer.coverage, answer.image_stored, answer.warnings) == (0.95, False, [])
    spent = answer.milliseconds
    assert list(spent) == ["decode", "queue", "network", "total"]
    assert spent["total"] >= spent["decode"] + spent["queue"] + spent["network"] - 0.01


async def test_an_ambiguous_or_unusual_image_is_referred(tmp_path: Any, ear: Ear, grey: Grey) -> None:
    # The threshold 0.95 keeps every class of probability 0.05 or more; the outlier score grows away from mid-grey.
    served = served_from(tiny_bundle(tmp_path / "b", outlier_threshold=0.9))
    async with predicting(ear, served) as predictor:
        clear, both, unlike = [given(await predictor.predict(grey(level))) for level in (235, 120, 255)]
    assert (clear.prediction_set, clear.decision, clear.reasons) == (["bright"], "accept", [])
    assert (both.prediction_set, both.decision, both.reasons) == (["dark", "bright"], "refer", ["ambiguous"])
    assert (unlike.decision, unlike.reasons) == ("refer", ["unlike-training"])
    assert unlike.outlier is not None
    assert unlike.outlier.threshold == pytest.approx(0.9)
    assert unlike.outlier.score == pytest.approx(tiny_outlier(np.full((16, 16, 1), 255, np.uint8)), abs=1e-3)


async def test_many_are_answered_in_order_beyond_one_window(ear: Ear, served: Served, grey: Grey) -> None:
    levels = [(37 * i) % 256 for i in range(2 * WINDOW + 5)]
    async with predicting(ear, served) as predictor:
        answers = [given(answer) for answer in await predictor.predict_many([grey(level) for level in levels])]
        assert (predictor.admission.images, predictor.admission.bytes) == (0, 0)
        await until(lambda: not predictor.busy)
    for level, answer in zip(levels, answers, strict=True):
        assert list(answer.probabilities.values()) == pytest.approx(expected(level), abs=1e-6)
    assert len({answer.id for answer in answers}) == len(levels)
    assert sum(size for size, _ in ear.batches) == len(levels)
    assert {"decode", "queue"} == set(ear.stages)


async def test_a_bad_image_is_refused_alone(ear: Ear, served: Served, grey: Grey) -> None:
    async with predicting(ear, served) as predictor:
        first, bad, last = await predictor.predict_many([grey(0), b"poison", grey(255)])
        assert isinstance(bad, MedLoopError)
        assert [given(first).label, given(last).label] == ["dark", "bright"]
        with pytest.raises(InvalidImage):
            await predictor.predict(b"")
    assert len(ear.told) == 4


async def test_what_waits_while_the_network_runs_becomes_one_batch(
    ear: Ear, served: Served, grey: Grey, gate: threading.Event
) -> None:
    network = Slowed(served.network, gate)
    async with predicting(ear, replace(served, network=network)) as predictor:
        alone = asyncio.create_task(predictor.predict(grey(10)))
        await until(lambda: network.now == 1)
        others = [asyncio.create_task(predictor.predict(grey(level))) for level in range(5)]
        await until(lambda: len(predictor._batcher._ready) == 5)
        gate.set()
        await asyncio.gather(alone, *others)
    assert network.runs == [1, 5]
    assert sorted(ear.batches) == [(1, "all-ready"), (5, "all-ready")]


async def test_an_item_on_which_the_network_fails_takes_nobody_with_it(
    ear: Ear, served: Served, grey: Grey, gate: threading.Event
) -> None:
    poisoned = replace(served, network=Slowed(served.network, gate, poison=77))
    gate.set()
    async with predicting(ear, poisoned) as predictor:
        outcomes = await predictor.predict_many([grey(level) for level in (1, 2, 77, 4, 5)])
        assert isinstance(outcomes.pop(2), InvalidImage)
        for level, outcome in zip((1, 2, 4, 5), outcomes, strict=True):
            assert list(given(outcome).probabilities.values()) == pytest.approx(expected(level), abs=1e-6)
    broken = replace(served, network=Slowed(served.network, gate, poison=0))  # fails on blank images, too
    async with predicting(ear, broken) as predictor:
        with pytest.raises(Unavailable):
            await predictor.predict(grey(0))


async def test_who_no_longer_waits_is_dropped_from_the_queue(
    ear: Ear, served: Served, grey: Grey, gate: threading.Event
) -> None:
    network = Slowed(served.network, gate)
    async with predicting(ear, replace(served, network=network)) as predictor:
        running = asyncio.create_task(predictor.predict(grey(1)))
        await until(lambda: network.now == 1)
        deadline = time.monotonic() + 0.05
        late = asyncio.create_task(predictor.predict(grey(2), Options(deadline=deadline)))
        left = asyncio.create_task(predictor.predict(grey(3)))
        patient = asyncio.create_task(predictor.predict(grey(4), Options(deadline=time.monotonic() + 600)))
        await until(lambda: time.monotonic() > deadline)
        left.cancel()
        gate.set()
        with pytest.raises(DeadlineExceeded):
            await late
        given(await running)
        given(await patient)
    assert network.runs == [1, 1]


async def test_overload_is_refused_at_the_door(ear: Ear, served: Served, grey: Grey, gate: threading.Event) -> None:
    slow = replace(served, network=Slowed(served.network, gate))
    async with predicting(ear, slow, queue_images=3) as predictor:
        accepted = [asyncio.create_task(predictor.predict(grey(level))) for level in (1, 2, 3)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await predictor.predict(grey(4))
        gate.set()
        await asyncio.gather(*accepted)
        given(await predictor.predict(grey(4)))


async def test_a_swap_takes_effect_between_batches(
    ear: Ear, first: Bundle, second: Bundle, grey: Grey, gate: threading.Event
) -> None:
    old = served_from(first, "1")
    network = Slowed(old.network, gate)
    now = [replace(old, network=network)]
    async with predicting(ear, lambda: now[0]) as predictor:
        before = [asyncio.create_task(predictor.predict(grey(150))) for _ in range(3)]
        await until(lambda: network.now == 1)
        now[0] = served_from(second, "2")
        after = [asyncio.create_task(predictor.predict(grey(150))) for _ in range(3)]
        await until(lambda: ear.stages.count("decode") == 6)
        gate.set()
        answers = [given(answer) for answer in await asyncio.gather(*before, *after)]
    assert [answer.model.version for answer in answers] == ["1"] * 3 + ["2"] * 3
    assert [answer.label for answer in answers] == ["bright"] * 3 + ["dark"] * 3


async def test_stopping_answers_what_was_accepted(ear: Ear, served: Served, grey: Grey, gate: threading.Event) -> None:
    network = Slowed(served.network, gate)
    async with predicting(ear, replace(served, network=network)) as predictor:
        waiting = [asyncio.create_task(predictor.predict(grey(level))) for level in range(4)]
        await until(lambda: network.now == 1)
        stopping = asyncio.create_task(asyncio.to_thread(predictor.stop))
        await until(lambda: predictor._batcher._stopping)
        gate.set()
        assert len([given(answer) for answer in await asyncio.gather(*waiting)]) == 4
        await stopping


class Holding(Ear):
    """Holds whatever lane decodes the first image, as if that took until `gate` opens."""

    def __init__(self, gate: threading.Event) -> None:
        super().__init__()
        self._gate, self.holds = gate, threading.Event()

    def stage(self, stage: str, seconds: float) -> None:
        if stage == "decode" and not self.holds.is_set():
            self.holds.set()
            assert self._gate.wait(10)
        super().stage(stage, seconds)


async def test_a_large_image_holds_up_no_small_one(served: Served, grey: Grey, gate: threading.Event) -> None:
    side = int(SMALL.max_pixels**0.5) + 8
    large = encode_png(np.full((side, side), 255, np.uint8))
    holding = Holding(gate)
    async with predicting(holding, served, lanes=1) as predictor:
        big = asyncio.create_task(predictor.predict(large))
        assert await asyncio.to_thread(holding.holds.wait, 10)
        small = given(await predictor.predict(grey(3)))
        assert not big.done()
        gate.set()
        assert given(await big).label == "bright"
    assert small.label == "dark"


class Where(Ear):
    """Notes which threads decode and which run the network."""

    def __init__(self) -> None:
        super().__init__()
        self.decoding: list[str] = []
        self.running: list[str] = []

    def stage(self, stage: str, seconds: float) -> None:
        if stage == "decode":
            self.decoding.append(threading.current_thread().name)

    def batch(self, size: int, why: str, seconds: float) -> None:
        super().batch(size, why, seconds)
        self.running.append(threading.current_thread().name)


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes every network for a light one, however slow this machine is, and believes it at once."""
    monkeypatch.setattr(batcher, "LIGHT_S", 60.0)
    monkeypatch.setattr(batcher, "TURN_S", 60.0)


HERE = threading.main_thread().name


async def test_light_images_are_answered_without_a_change_of_threads(served: Served, grey: Grey, light: None) -> None:
    where = Where()
    async with predicting(where, served) as predictor:
        good = [given(answer) for answer in await predictor.predict_many([grey(level) for level in (3, 250, 9)])]
        (prepared,) = await predictor.predict_pixels(np.full((1, 16, 16, 1), 255, np.uint8))
    assert [answer.label for answer in good] == ["dark", "bright", "dark"]
    assert given(prepared).label == "bright"
    assert where.batches == [(3, "all-ready"), (1, "all-ready")]
    assert {*where.decoding, *where.running} == {HERE}


async def test_what_is_not_light_after_all_goes_to_a_lane(served: Served, grey: Grey, light: None) -> None:
    where = Where()
    side = int(LIGHT.max_pixels**0.5) + 8
    images = [grey(3), encode_png(np.full((side, side), 255, np.uint8)), b"no image"]
    async with predicting(where, served) as predictor:
        small, large, broken = await predictor.predict_many(images)
    assert (given(small).label, given(large).label) == ("dark", "bright")
    assert isinstance(broken, MedLoopError)
    assert [name == HERE for name in where.decoding] == [True, False]


async def test_heavy_networks_never_run_in_the_event_loop(
    served: Served, grey: Grey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batcher, "LIGHT_S", 0.0)
    where = Where()
    async with predicting(where, served) as predictor:
        for level in range(30):
            given(await predictor.predict(grey(level)))
    assert HERE not in {*where.decoding, *where.running}


async def test_others_have_their_turn_between_light_images(
    served: Served, grey: Grey, light: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batcher, "TURN_S", 0.0)  # one image a turn
    ear, turns = Ear(), 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with predicting(ear, served) as predictor:
        counting = asyncio.create_task(count())
        answers = [given(answer) for answer in await predictor.predict_many([grey(level) for level in range(20)])]
        counting.cancel()
    assert [answer.label for answer in answers] == ["dark"] * 20
    assert [size for size, _ in ear.batches] == [1] * 20
    assert turns >= 20


async def test_a_swap_between_light_images_takes_effect_at_once(
    ear: Ear, first: Bundle, second: Bundle, grey: Grey, light: None
) -> None:
    now = [served_from(first, "1")]
    async with predicting(ear, lambda: now[0]) as predictor:
        before = asyncio.create_task(predictor.predict(grey(150)))
        await asyncio.sleep(0)  # it was asked, and waits for its turn
        now[0] = served_from(second, "2")
        after = given(await predictor.predict(grey(150)))
        assert (given(await before).model.version, after.model.version) == ("1", "2")
    assert (given(before.result()).label, after.label) == ("bright", "dark")


async def test_light_or_not_only_the_poisoned_image_fails(
    ear: Ear, served: Served, grey: Grey, light: None, gate: threading.Event
) -> None:
    gate.set()
    network = Slowed(served.network, gate, poison=77)
    async with predicting(ear, replace(served, network=network)) as predictor:
        outcomes = await predictor.predict_many([grey(level) for level in (3, 77, 250)])
    assert [isinstance(outcome, MedLoopError) for outcome in outcomes] == [False, True, False]


class SlowReader(DicomReader):
    """Takes every file for a white image, when `gate` opens."""

    def __init__(self, gate: threading.Event) -> None:
        super().__init__()
        self._gate = gate

    def read(self, data: bytes, frame: int | None = None) -> DicomImage:
        assert self._gate.wait(30)
        return DicomImage(np.full((16, 16, 1), 255, np.uint8), ("burned in",))


async def test_slow_decoding_is_bounded_and_shuts_nobody_out(
    ear: Ear, served: Served, grey: Grey, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    dicom = b"\0" * 128 + b"DICM"
    async with predicting(ear, served, reader=SlowReader(gate)) as predictor:
        slow = [asyncio.create_task(predictor.predict(dicom)) for _ in range(SLOW_IMAGES)]
        await until(lambda: predictor.admission.slow == SLOW_IMAGES)
        with pytest.raises(Overloaded):
            await predictor.predict(dicom)
        predictor.admission.seconds_per_image = 60.0  # of those before it, none may count
        assert given(await predictor.predict(grey(3))).label == "dark"
        began: list[float] = []
        monkeypatch.setattr(predictor.admission, "ran", lambda _, seconds: began.append(time.monotonic() - seconds))
        opened = time.monotonic()
        gate.set()
        answers = [given(answer) for answer in await asyncio.gather(*slow)]
        assert {(answer.label, *answer.warnings) for answer in answers} == {("bright", "burned in")}
        assert min(began) >= opened  # what their decoding took is not the network's time
        together = await asyncio.gather(*(predictor.predict(grey(level)) for level in range(4)))
        assert len([given(answer) for answer in together]) == 4
    assert (predictor.admission.slow, predictor.admission.images, predictor.admission.bytes) == (0, 0, 0)


async def test_bytes_are_held_until_the_queue_lets_them_go(
    ear: Ear, served: Served, grey: Grey, gate: threading.Event
) -> None:
    image, network = grey(1), Slowed(served.network, gate)
    async with predicting(ear, replace(served, network=network)) as predictor:
        asked = [asyncio.create_task(predictor.predict(image)) for _ in range(3)]
        await until(lambda: network.now == 1 and ear.stages.count("decode") == 3)
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        assert predictor.admission.bytes == 3 * len(image)
        gate.set()
        await until(lambda: not predictor.admission.images)
        assert predictor.admission.bytes == 0


async def test_prepared_pixels_are_answered_as_they_are(ear: Ear, served: Served) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 1), dtype=np.uint8)
    async with predicting(ear, served) as predictor:
        answers = [given(answer) for answer in await predictor.predict_pixels(pixels)]
        for row, answer in zip(pixels, answers, strict=True):
            assert list(answer.probabilities.values()) == pytest.approx(tiny_probabilities(row), abs=1e-6)
            assert answer.image_hash == hashlib.sha256(row.tobytes()).hexdigest()
        wrongs: tuple[Any, ...] = (pixels[:0], pixels[0], pixels.astype(np.float32), pixels[:, :8])
        for wrong in wrongs:
            with pytest.raises(InvalidRequest):
                await predictor.predict_pixels(wrong)


async def test_without_a_model_nothing_is_taken(ear: Ear) -> None:
    def nothing() -> Served:
        raise NoModel("none")

    async with predicting(ear, nothing) as predictor:
        with pytest.raises(NoModel):
            await predictor.predict(b"x")


async def test_a_record_is_the_answer_and_more(ear: Ear, served: Served, grey: Grey) -> None:
    import base64
    import json

    async with predicting(ear, served) as predictor:
        answer = await predictor.predict(grey(51))
    record = json.loads(record_of(answer, "request", "caller"))
    assert {key: record.pop(key) for key in ("request_id", "caller")} == {"request_id": "request", "caller": "caller"}
    embedding = np.frombuffer(base64.b64decode(record.pop("embedding")), "<f2")
    assert embedding == pytest.approx(answer.embedding, rel=1e-3)
    assert record == json.loads(answer.json)


async def test_as_many_runs_go_on_at_once_as_there_is_room_for(
    ear: Ear, served: Served, grey: Grey, gate: threading.Event
) -> None:
    network = Slowed(served.network, gate)
    async with predicting(ear, replace(served, network=network), lanes=3, runs=2) as predictor:
        waiting = []
        for running in (1, 2):
            waiting.append(asyncio.create_task(predictor.predict(grey(1))))
            await until(lambda running=running: network.now == running)  # type: ignore[misc]
        waiting.append(asyncio.create_task(predictor.predict(grey(2))))
        await until(lambda: len(predictor._batcher._ready) == 1)
        await asyncio.sleep(0.05)  # in which the third lane could go where there is no room
        gate.set()
        assert [given(answer).label for answer in await asyncio.gather(*waiting)] == ["dark"] * 3
    assert network.most_at_once == 2
