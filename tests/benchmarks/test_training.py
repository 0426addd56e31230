"""The training benchmark's bookkeeping and statistics, on things small enough to know the answer."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from medloop.data.manifest import Split
from medloop.data.sources import open_source
from medloop.errors import TrackingUnavailable
from medloop.registry import TAG_DATASET, Version
from medloop.schemas import Estimate, now
from medloop.testing import TINY_CLASSES, FolderRegistry, tiny_bundle
from medloop_evaluator.metrics import Scorer, estimates
from medloop_evaluator.resample import Resampling
from rich.console import Console

from benchmarks.training import scoring, tables
from benchmarks.training.averages import over_images, over_seeds, without_temperature
from benchmarks.training.bench import Asked, Bench
from benchmarks.training.cutmix import gains
from benchmarks.training.runs import Record, Runs, Scored, Wanted
from benchmarks.training.sets import SETS, Set, content


def record(wanted: Wanted, **values: Any) -> Record:
    found = dict.fromkeys(("version", "run_id", "dataset_id", "bundle_digest"), "0")
    numbers = {"temperature": 1.0, "epochs": 1, "best_epoch": 1, "seconds": 9.0, "resumed": False, "git_commit": None}
    return Record(set=wanted.set, seed=wanted.seed, cutmix=wanted.cutmix, **{**found, **numbers, **values})


def scored(value: float = 0.5) -> Scored:
    estimate = Estimate(value=value, low=0.0, high=1.0, method="wilson")
    return Scored(at=now(), images=10, dropped=0, accuracy=estimate, auc=estimate)


class Fakes:
    """A trainer and a scorer that count; the trainer fails while `broken`."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.looked: list[tuple[int, Split]] = []
        self.broken = False

    def train(self, wanted: Wanted) -> Record:
        self.trained.append(wanted.name)
        if self.broken:
            raise KeyboardInterrupt
        return record(wanted)

    def score(self, record: Record, split: Split) -> Scored:
        self.looked.append((record.seed, split))
        if self.broken:
            raise KeyboardInterrupt
        return scored()

    def runs(self, folder: Path, **options: float | str) -> Runs:
        return Runs(folder, options, self.train, self.score)


def test_what_was_done_is_not_done_again(tmp_path: Path) -> None:
    fakes = Fakes()
    first = fakes.runs(tmp_path).get(Wanted("a", 0), "val")
    assert fakes.runs(tmp_path).get(Wanted("a", 0), "val") == first
    fakes.runs(tmp_path).get(Wanted("a", 0, cutmix=False), "val")
    assert fakes.trained == ["a-seed0-cutmix", "a-seed0-plain"]
    assert fakes.looked == [(0, "val"), (0, "val")]


def test_the_test_split_is_read_when_it_is_asked_for_and_without_another_training(tmp_path: Path) -> None:
    fakes = Fakes()
    assert fakes.runs(tmp_path).get(Wanted("a", 0), "val").scored.keys() == {"val"}
    assert fakes.runs(tmp_path).get(Wanted("a", 0), "test").scored.keys() == {"val", "test"}
    assert (len(fakes.trained), fakes.looked) == (1, [(0, "val"), (0, "test")])


def test_what_was_stopped_is_done_again_and_nothing_else(tmp_path: Path) -> None:
    fakes = Fakes()
    fakes.broken = True
    with pytest.raises(KeyboardInterrupt):
        fakes.runs(tmp_path).get(Wanted("a", 0), "val")
    assert not list(tmp_path.glob("runs/*"))
    fakes.broken = False
    fakes.runs(tmp_path).get(Wanted("a", 0), "val")
    fakes.broken = True
    with pytest.raises(KeyboardInterrupt):  # trained, but not scored
        fakes.runs(tmp_path).get(Wanted("a", 0), "test")
    fakes.broken = False
    fakes.runs(tmp_path).get(Wanted("a", 0), "test")
    assert len(fakes.trained) == 2
    assert [path.name for path in tmp_path.glob("runs/*")] == ["a-seed0-cutmix.json"]


def test_a_folder_holds_runs_of_one_kind(tmp_path: Path) -> None:
    Fakes().runs(tmp_path, preset="quick")
    Fakes().runs(tmp_path, preset="quick")
    with pytest.raises(ValueError, match=r"quick.*--work.*best"):
        Fakes().runs(tmp_path, preset="best")


def answers(seed: int, images: int = 60) -> Scorer:
    """Three classes, somewhat rightly told apart; the labels are the same for every seed."""
    labels = np.arange(images) % 3
    rng = np.random.default_rng(seed)
    powers = np.exp(rng.normal(size=(images, 3)) + 1.5 * (labels[:, None] == np.arange(3)))
    return Scorer(powers / powers.sum(axis=1, keepdims=True), labels, ("a", "b", "c"))


@pytest.mark.parametrize("metric", ["auc", "accuracy", "ece"])
def test_of_one_seed_the_average_is_the_evaluators_own_estimate(metric: str) -> None:
    scorer = answers(0)
    known = estimates(scorer, Resampling(scorer.labels, None))[metric]
    found = over_images([scorer], metric)
    assert (found.mean, found.low, found.high) == pytest.approx((known.value, known.low, known.high))
    assert found.std is None


def test_images_that_all_seeds_share_are_drawn_together() -> None:
    one, other = answers(0), answers(1)
    both = over_images([one, other], "auc")
    apart = [over_images([scorer], "auc") for scorer in (one, other)]
    assert both.mean == pytest.approx(np.mean([each.mean for each in apart]))
    assert both.std == pytest.approx(np.std([each.mean for each in apart], ddof=1))
    # The same answers twice are no more evidence than once.
    twice = over_images([one, one], "auc")
    assert (twice.low, twice.high) == pytest.approx((apart[0].low, apart[0].high))
    with pytest.raises(ValueError, match="different images"):
        over_images([one, answers(0, 57)], "auc")


def test_the_interval_over_seeds_is_students() -> None:
    # Of 1 to 5: mean 3, standard deviation √2.5, and t of 4 degrees of freedom is 2.776 (any table).
    found = over_seeds([1, 2, 3, 4, 5])
    assert (found.mean, found.std) == pytest.approx((3, 2.5**0.5))
    assert (found.low, found.high) == pytest.approx((3 - 2.776 * 0.5**0.5, 3 + 2.776 * 0.5**0.5), abs=1e-3)
    assert over_seeds([1]).high == np.inf


def test_gains_are_of_pairs() -> None:
    # The seeds differ widely, the pairs always by 0.01: an unpaired interval would hold 0.
    figures = gains([0.61, 0.81, 0.91], [0.6, 0.8, 0.9], "", "auc", "breastmnist")
    assert figures["cutmix_gain.breastmnist"] == pytest.approx(0.01)
    assert figures["cutmix_gain.breastmnist.low"] == pytest.approx(0.01)
    assert "cutmix_gain.breastmnist.low" not in gains([0.61], [0.6], "", "auc", "breastmnist")


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_temperature_can_be_taken_back(temperature: float) -> None:
    logits = np.random.default_rng(0).normal(size=(20, 3)) * 3

    def softmax(z: np.ndarray) -> Any:
        return np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)

    served = softmax(logits / temperature).astype(np.float32)
    assert without_temperature(served, temperature) == pytest.approx(softmax(logits), abs=1e-5)
    assert np.isfinite(without_temperature(np.array([[1.0, 0.0]], np.float32), temperature)).all()


def test_files_are_counted_by_what_is_in_them(tmp_path: Path) -> None:
    npz, zipped = tmp_path / "a.npz", tmp_path / "a.zip"
    np.savez(npz, train_labels=np.zeros((5, 1)), test_labels=np.zeros((3, 1)), test_images=np.zeros((3, 2, 2)))
    with zipfile.ZipFile(zipped, "w") as archive:
        for name in ("x/1.jpeg", "x/2.JPG", "x/read.me", "y/"):
            archive.writestr(name, b"")
    assert (content(npz).images, content(npz).test) == (8, 3)
    assert (content(zipped).images, content(zipped).test) == (2, None)


def shown(figures: dict[str, float | str]) -> str:
    console = Console(width=tables.WIDTH, file=io.StringIO())
    tables.show(figures, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def scores(prefix: str, auc: float) -> dict[str, float | str]:
    place = f"{prefix}scores.pneumoniamnist"
    figures: dict[str, float | str] = {f"{place}.dataset_id": "abcdef" * 10, f"{place}.images": 624}
    for metric in ("auc", "accuracy"):
        of = f"{place}.{metric}"
        figures |= {f"{of}.mean": auc, f"{of}.std": 0.01, f"{of}.low": auc - 0.02, f"{of}.high": auc + 0.02}
    return figures


def test_tables_hold_figures_against_their_targets() -> None:
    text = shown({**scores("", 0.971), "epoch_over_compute": 1.04, "tracking_share": 0.02})
    assert "0.9710 ± 0.0100 [0.951, 0.991]" in text
    assert "≥ 0.975 missed" in text  # AUC
    assert "≥ 0.91 met" in text  # accuracy
    assert "Google AutoML Vision" in text
    assert "abcdefabcdef" in text
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert "≤ 1.05 │ met" in lines["epoch_over_compute"]
    assert "≤ 0.01 │ missed" in lines["tracking_share"]


def test_figures_of_val_are_held_against_no_target_and_nobody() -> None:
    text = shown(scores("val.", 0.99))
    assert "Scores on val" in text
    assert not any(word in text for word in ("met", "≥", "AutoML"))


def test_every_figure_is_shown() -> None:
    gain = gains([0.9, 0.91], [0.8, 0.82], "val.", "auc", "breastmnist")
    gain |= gains([0.9, 0.91], [0.8, 0.82], "val.", "accuracy", "breastmnist")
    ece = {f"{stem}.bccd-cells_64{end}": 0.04 for stem in ("ece", "ece_before") for end in ("", ".low", ".high")}
    text = shown({**gain, **ece, "something.else": 7.25})
    assert "+0.0950" in text
    assert "≤ 0.05 met" in text
    assert "7.250" in text
    assert "cutmix_gain" not in text  # has a table of its own
    assert "ece" not in text


class OfflineBench(Bench):
    """No MLflow: a registry in folders, and a client that remembers what it was told."""

    tracking_uri = "memory:"
    registry: Any

    def __init__(self, folder: Path, fail: bool = False) -> None:
        super().__init__(folder)
        self.told: list[tuple[str, ...]] = []

        def tell(kind: str) -> Callable[..., None]:
            def note(run_id: str, *rest: object) -> None:
                if fail:
                    raise ConnectionError
                self.told.append((kind, run_id, *map(str, rest)))

            return note

        client = SimpleNamespace(set_tag=tell("tag"), log_metric=tell("metric"))
        self.registry = type("Registry", (FolderRegistry,), {"client": client})()


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """A set of ten images in each split, dark and bright ones, which the tiny network tells apart."""
    monkeypatch.setitem(SETS, "tiny", Set("tiny.npz"))
    arrays: dict[str, Any] = {}
    for place, split in enumerate(("train", "val", "calibration", "test")):
        labels = np.arange(10) % 2
        arrays[f"{split}_labels"] = labels
        arrays[f"{split}_images"] = (labels * 170 + 20 + np.arange(10) + 10 * place)[:, None, None] + np.zeros((16, 16))
    (tmp_path / "tiny.classes.txt").write_text("\n".join(TINY_CLASSES))
    np.savez(tmp_path / "tiny.npz", **{k: v.astype(np.uint8) for k, v in arrays.items()})
    return Asked(sets=("tiny",), data=tmp_path)


def registered(bench: OfflineBench, asked: Asked) -> Record:
    """A trained run of the tiny network."""
    dataset_id = scoring.manifest(bench, asked, "tiny").id
    bundle = tiny_bundle(bench.folder / "bundle", dataset_id=dataset_id, run_id="r" * 32)
    version: Version = bench.registry.version("tiny", bench.registry.add(bundle))
    assert version.tags[TAG_DATASET] == dataset_id
    found = {"version": version.version, "run_id": "r" * 32, "dataset_id": dataset_id, "bundle_digest": bundle.digest}
    return record(Wanted("tiny", 0), **found)


def test_scores_are_the_evaluators_and_no_image_is_dropped(tmp_path: Path, asked: Asked) -> None:
    bench = OfflineBench(tmp_path / "work")
    run = registered(bench, asked)
    found = scoring.score(bench, asked, run, "val")
    assert (found.images, found.dropped, found.accuracy.value, found.auc.value) == (10, 0, 1.0, 1.0)
    assert found.accuracy.method == "wilson"
    assert scoring.answered(bench, scoring.manifest(bench, asked, "tiny"), run, "val").scorer.correct.all()
    assert bench.told == []  # validation is nobody's secret
    assert not (bench.folder / "readings.jsonl").exists()


def test_each_reading_of_test_is_noted(tmp_path: Path, asked: Asked) -> None:
    bench = OfflineBench(tmp_path / "work")
    run = registered(bench, asked)
    for _ in range(2):
        assert scoring.score(bench, asked, run, "test").images == 10
    lines = [json.loads(line) for line in (bench.folder / "readings.jsonl").read_text().splitlines()]
    assert [line["run_id"] for line in lines] == [run.run_id] * 2
    tags = [told for told in bench.told if told[0] == "tag"]
    assert [tag[3] for tag in tags] == [f"{n}, the first at {lines[0]['at']}" for n in (1, 2)]
    assert ("metric", run.run_id, "test_accuracy", "1.0") in bench.told


def test_a_reading_that_cannot_be_noted_is_not_made(tmp_path: Path, asked: Asked) -> None:
    bench = OfflineBench(tmp_path / "work", fail=True)
    run = registered(bench, asked)
    with pytest.raises(TrackingUnavailable):
        scoring.score(bench, asked, run, "test")
    assert not list(bench.objects.list("evaluations/"))
    assert (bench.folder / "readings.jsonl").exists()


def test_a_version_is_built_once_for_one_file(tmp_path: Path, asked: Asked) -> None:
    bench = OfflineBench(tmp_path / "work")
    first = bench.dataset("tiny", "mark", lambda: open_source(str(tmp_path / "tiny.npz")))

    def never() -> Any:
        raise AssertionError("built again")

    assert OfflineBench(tmp_path / "work").dataset("tiny", "mark", never).id == first.id
    with pytest.raises(AssertionError, match="built again"):
        OfflineBench(tmp_path / "work").dataset("tiny", "another", never)


def test_sets_that_are_not_there_are_left_out_with_a_reason(
    tmp_path: Path, asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    both = Asked(sets=("tiny", "breastmnist"), data=tmp_path)
    assert scoring.available(both, ["tiny", "breastmnist", "pneumoniamnist"]) == ["tiny"]
    assert "breastmnist is left out" in (told := capsys.readouterr().err)
    assert "--data" in told
    assert "pneumoniamnist" not in told
