"""The challenger sees a sample of what was answered, when nobody waits, and can do no harm to anybody."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from medloop.bundle import GOLDEN, MODEL, Bundle, Golden, write_card
from medloop.errors import StorageUnavailable, TrackingUnavailable
from medloop.registry import CHALLENGER, CHAMPION, State
from medloop.schemas import Disagreement, ModelRef, Prediction
from medloop.settings import HomeSettings
from medloop.storage.records import RecordStore
from medloop.storage.sqlite import SqliteRecords
from medloop.testing import FolderRegistry, tiny_bundle, tiny_probabilities
from medloop.vision.prepare import prepare
from medloop_inference.champion import RECHECK_SECONDS
from medloop_inference.shadow import CAPACITY, PATIENCE_SECONDS, Shadow, is_sampled

HASH = "0" * 64  # belongs to every sample
Grey = Callable[..., bytes]


class Steady(FolderRegistry):
    """Answers, or does not while it is `down`."""

    down = False

    def state(self, model: str) -> State | None:
        if self.down:
            raise TrackingUnavailable("MLflow does not answer.")
        return super().state(model)


class Busy:
    """Says whether anybody waits."""

    now = False

    def __call__(self) -> bool:
        return self.now


class Store(SqliteRecords):
    """Refuses to write while it is `down`."""

    down = False

    def put_many(self, kind: str, items: Sequence[tuple[str, Mapping[str, Any]]]) -> int:
        if self.down:
            raise StorageUnavailable("Records are down.")
        return super().put_many(kind, items)


@pytest.fixture
def shelf() -> Steady:
    return Steady()


@pytest.fixture
def busy() -> Busy:
    return Busy()


@pytest.fixture
def store(home: Path) -> Iterator[Store]:
    found = Store(home / "records.sqlite")
    yield found
    found.close()


@pytest.fixture
def shadow(shelf: Steady, home: Path, store: Store, busy: Busy, clock: Any) -> Shadow:
    return Shadow(
        "tiny", shelf, HomeSettings(), store, share=0.5, busy=busy, poll_seconds=0.05, flush_seconds=0.05, clock=clock
    )


@pytest.fixture
def running(shadow: Shadow) -> Iterator[Shadow]:
    shadow.start()
    yield shadow
    shadow.stop()


def challenge(shelf: Steady, bundle: Bundle) -> str:
    version = shelf.add(bundle)
    shelf.aliases[CHALLENGER] = version
    return version


def champion_says(level: int, version: str = "99", image_hash: str = HASH) -> dict[str, Any]:
    """What a champion of bias 0 said to an image of one grey level."""
    probabilities = tiny_probabilities(np.full((16, 16, 1), level, np.uint8)).tolist()
    classes = ["dark", "bright"]
    return Prediction(
        model=ModelRef(name="tiny", version=version, run_id="r", dataset_id="d", bundle_digest="b"),
        image_hash=image_hash,
        label=classes[int(np.argmax(probabilities))],
        probabilities=dict(zip(classes, probabilities, strict=True)),
        prediction_set=[],
        coverage=0.95,
        milliseconds={},
    ).model_dump(mode="json")


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> None:  # its thread comes last
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def recorded(store: RecordStore, version: str) -> list[Disagreement]:
    found = store.find("disagreements", {"model": "tiny", "version": version}, newest_first=False)
    return [Disagreement.model_validate(record.document) for record in found.items]


def test_the_sample_is_a_share_of_images_and_always_the_same_ones() -> None:
    generator = np.random.default_rng(0)
    hashes = [generator.bytes(32).hex() for _ in range(4000)]
    small, large = ({one for one in hashes if is_sampled(one, share)} for share in (0.1, 0.3))
    assert small < large
    assert (round(len(small) / 4000, 1), round(len(large) / 4000, 1)) == (0.1, 0.3)
    assert not any(is_sampled(one, 0.0) for one in [*hashes, HASH])
    assert all(is_sampled(one, 1.0) for one in [*hashes, "f" * 64])


def test_other_labels_than_the_champion_s_are_counted_and_recorded(
    running: Shadow, shelf: Steady, store: Store, second: Bundle, grey: Grey
) -> None:
    version = challenge(shelf, second)
    eventually(lambda: running.describe().model is not None)
    assert running.describe().model is not None
    levels = (10, 100, 150, 200, 250)
    asked = [champion_says(level) for level in levels]
    for number, (level, prediction) in enumerate(zip(levels, asked, strict=True), 1):
        running.offer(prediction, grey(level))
        eventually(lambda number=number: running.describe().compared == number)  # type: ignore[misc]
    running.offer(champion_says(150, image_hash="f" * 64), grey(150))  # not of the sample
    theirs = [tiny_probabilities(np.full((16, 16, 1), level, np.uint8), bias=3.0) for level in levels]
    other = [p for p, t in zip(asked, theirs, strict=True) if (p["label"] == "bright") != (t.argmax() == 1)]
    eventually(lambda: len(recorded(store, version)) == len(other) > 0)
    assert [found.prediction_id for found in recorded(store, version)] == [p["id"] for p in other]
    first = recorded(store, version)[0]
    assert (first.champion, first.challenger, first.image_hash) == ("99", version, HASH)
    assert (first.champion_label, first.champion_probabilities) == ("bright", asked[2]["probabilities"])
    assert first.challenger_label == "dark"
    assert first.challenger_probabilities["dark"] == pytest.approx(theirs[2][0], abs=1e-5)
    assert running.describe().model_dump(include={"compared", "disagreements", "skipped", "problem", "share"}) == {
        "share": 0.5,
        "compared": 5,
        "disagreements": len(other),
        "skipped": 0,
        "problem": None,
    }


def test_people_come_first_and_what_they_displace_is_counted(
    running: Shadow, shelf: Steady, busy: Busy, second: Bundle, grey: Grey
) -> None:
    challenge(shelf, second)
    eventually(lambda: running.describe().model is not None)
    said, image = [champion_says(150) for _ in range(CAPACITY + 10)], grey(150)
    busy.now = True
    started = time.monotonic()
    for prediction in said:
        running.offer(prediction, image)
    assert time.monotonic() - started < 4 * PATIENCE_SECONDS  # had it waited for room: more than twice that
    assert running.describe().skipped >= 9
    eventually(lambda: running.describe().skipped >= 10)  # patience is over for one that waited
    assert running.describe().compared == 0
    busy.now = False
    eventually(lambda: running.describe().compared + running.describe().skipped == CAPACITY + 10)
    assert running.describe().compared > 0


def test_a_challenger_that_is_prepared_otherwise_prepares_the_image_itself(
    running: Shadow, shelf: Steady, store: Store, grey: Grey, tmp_path: Path, first: Bundle
) -> None:
    other = tiny_bundle(tmp_path / "other", model="tiny", size=24, bias=3.0)
    version = challenge(shelf, other)
    eventually(lambda: running.describe().model is not None)
    prepared = np.zeros((16, 16, 1), np.uint8)
    running.offer(champion_says(150), grey(150), prepared, first.card.preparation)
    eventually(lambda: len(recorded(store, version)) == 1)
    expected = tiny_probabilities(prepare(grey(150), other.card.preparation), bias=3.0)
    (found,) = recorded(store, version)
    assert found.challenger_probabilities["dark"] == pytest.approx(expected[0], abs=1e-5)


def test_pixels_that_fit_spare_the_challenger_the_image(
    running: Shadow, shelf: Steady, store: Store, second: Bundle
) -> None:
    version = challenge(shelf, second)
    eventually(lambda: running.describe().model is not None)
    running.offer(champion_says(150), b"", np.full((16, 16, 1), 150, np.uint8), second.card.preparation)
    eventually(lambda: len(recorded(store, version)) == 1)


def test_an_image_it_cannot_read_is_its_own_problem_and_the_next_one_is_answered(
    running: Shadow, shelf: Steady, second: Bundle, grey: Grey
) -> None:
    challenge(shelf, second)
    eventually(lambda: running.describe().model is not None)
    running.offer(champion_says(150), b"no image")
    eventually(lambda: running.describe().skipped == 1)
    assert "cannot answer" in (running.describe().problem or "")
    running.offer(champion_says(150), grey(150))
    eventually(lambda: running.describe().compared == 1)
    assert running.describe().problem is None


@pytest.mark.parametrize("fault", ["flipped", "golden", "nothing"])
def test_a_challenger_that_fails_its_checks_is_never_asked(
    shadow: Shadow, shelf: Steady, tmp_path: Path, clock: Any, grey: Grey, fault: str
) -> None:
    bundle = tiny_bundle(tmp_path / "challenger", model="tiny")
    if fault == "golden":
        golden = bundle.golden
        Golden(golden.encoded, golden.pixels, golden.prepared, golden.probabilities[::-1]).save(bundle.folder / GOLDEN)
        bundle = write_card(bundle.folder, bundle.card)
    version = challenge(shelf, bundle)
    if fault == "flipped":
        model = bundle.folder / MODEL
        intact = model.read_bytes()
        model.write_bytes(intact[:100] + bytes([intact[100] ^ 1]) + intact[101:])
    elif fault == "nothing":
        shelf.aliases[CHALLENGER] = "77"
    for _ in range(3):
        shadow.poll_once()
    shadow.offer(champion_says(150), grey(150))
    said = {"flipped": "its SHA-256 differs", "golden": "golden inputs are off", "nothing": "version 77 is not in"}
    found = shadow.describe()
    assert (found.model, found.compared, found.skipped) == (None, 0, 0)
    assert said[fault] in (found.problem or "")
    assert shelf.asked.count("version") == 1  # not at every poll
    if fault == "flipped":
        model.write_bytes(intact)
        clock.now += RECHECK_SECONDS
        shadow.poll_once()
        assert (shadow.describe().model or found).version == version  # type: ignore[union-attr]
        assert shadow.describe().problem is None


def test_it_follows_its_alias_and_needs_mlflow_only_for_that(
    shadow: Shadow, shelf: Steady, first: Bundle, second: Bundle, grey: Grey
) -> None:
    def shadowed() -> str | None:
        shadow.poll_once()
        found = shadow.describe().model
        return found.version if found else None

    assert shadowed() is None
    assert challenge(shelf, first) == shadowed() == "1"
    for _ in range(CAPACITY + 1):  # nothing takes them: it was not started
        shadow.offer(champion_says(150), grey(150))
    assert shadow.describe().skipped == 1
    shelf.down = True
    assert shadowed() == "1"
    shelf.down = False
    assert challenge(shelf, second) == shadowed() == "2"
    assert shadow.describe().skipped == 0
    shelf.aliases[CHAMPION] = "2"
    assert shadowed() is None
    del shelf.aliases[CHALLENGER]
    assert shadowed() is None


def test_the_challenger_s_own_answers_are_not_compared_with_themselves(
    running: Shadow, shelf: Steady, second: Bundle, grey: Grey
) -> None:
    version = challenge(shelf, second)
    eventually(lambda: running.describe().model is not None)
    running.offer(champion_says(150, version=version), grey(150))
    running.offer(champion_says(150), grey(150))
    eventually(lambda: running.describe().compared == 1)
    time.sleep(0.05)
    assert running.describe().compared == 1


def test_disagreements_outlast_records_being_down_and_are_written_once(
    shadow: Shadow, shelf: Steady, store: Store, second: Bundle, grey: Grey
) -> None:
    version = challenge(shelf, second)
    store.down = True
    shadow.start()
    eventually(lambda: shadow.describe().model is not None)
    predictions = [champion_says(150) for _ in range(3)]
    for number, prediction in enumerate(predictions, 1):
        shadow.offer(prediction, grey(150))
        eventually(lambda number=number: shadow.describe().disagreements == number)  # type: ignore[misc]
    eventually(lambda: "Records are down" in (shadow.describe().problem or ""))
    store.down = False
    shadow.stop(60)
    assert [found.prediction_id for found in recorded(store, version)] == [one["id"] for one in predictions]
    assert shadow.describe().problem is None
