"""Scores of a trained run on one split, by the evaluator's own figures; a reading of `test` is noted before it is made.

readings.jsonl   a line for each time that a run was held against the test split
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from medloop.data.manifest import Manifest, Split
from medloop.data.sources import open_source
from medloop.registry import fetch_bundle, translated
from medloop.schemas import now
from medloop_evaluator.answers import Answers, evaluation_key, read_or_compute
from medloop_evaluator.metrics import Scorer, estimates
from medloop_evaluator.resample import Resampling, clusters
from numpy.typing import NDArray

from benchmarks.training.bench import Asked, Bench, say
from benchmarks.training.runs import Record, Runs, Scored, Wanted
from benchmarks.training.sets import SETS, content, digest
from benchmarks.training.trainer import train

READINGS_TAG = "medloop.test_readings"
"""Of a run: how often it was held against the test split, and since when."""


@dataclass(frozen=True, slots=True)
class Answered:
    """What a run answered on a split. `groups` int64 [N], None where images are independent."""

    probabilities: NDArray[np.float32]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    groups: NDArray[np.int64] | None

    @property
    def scorer(self) -> Scorer:
        return Scorer(self.probabilities, self.labels, self.classes)


class Study:
    """The runs of one work folder, trained and scored when they are asked for."""

    def __init__(self, bench: Bench, asked: Asked) -> None:
        self._bench, self._asked = bench, asked
        self._runs = Runs(bench.folder, asked.options, self._train, partial(score, bench, asked))

    def records(self, name: str, seeds: Sequence[int], *, cutmix: bool = True) -> list[Record]:
        """One a seed, each scored on the split that was asked for."""
        found = []
        for seed in seeds:
            record = self._runs.get(Wanted(name, seed, cutmix), self._asked.split)
            scored = record.scored[self._asked.split]
            say(
                f"{name} seed {seed}{'' if cutmix else ' without CutMix'}: {self._asked.split} "
                f"AUC {scored.auc.value:.4f}, accuracy {scored.accuracy.value:.4f}, {record.seconds:.0f} s"
            )
            found.append(record)
        return found

    def answered(self, record: Record) -> Answered:
        """What was kept when the run was scored."""
        return answered(self._bench, manifest(self._bench, self._asked, record.set), record, self._asked.split)

    def _train(self, wanted: Wanted) -> Record:
        return train(self._bench, self._asked, wanted, manifest(self._bench, self._asked, wanted.set).id)


def available(asked: Asked, names: Sequence[str]) -> list[str]:
    """Those that were asked for and are there; tells of each that is not."""
    wanted = [name for name in names if name in asked.sets]
    missing = [name for name in wanted if not (asked.data / SETS[name].file).is_file()]
    for name in missing:
        say(f"{name} is left out: {asked.data / SETS[name].file} is not there; name its folder with --data.")
    return [name for name in wanted if name not in missing]


def manifest(bench: Bench, asked: Asked, name: str) -> Manifest:
    file = asked.data / SETS[name].file
    return bench.dataset(name, digest(file), lambda: open_source(str(file)))


def score(bench: Bench, asked: Asked, record: Record, split: Split) -> Scored:
    """Hold a run against a split of its data set."""
    if split == "test":
        note_reading(bench, record)
    of, version = manifest(bench, asked, record.set), bench.registry.version(record.set, record.version)
    bundle = fetch_bundle(bench.registry, version, bench.home.bundles_dir)
    read_or_compute(bundle, of, split, bench.objects, bench.home.cache_dir, _in_silence)
    found = answered(bench, of, record, split)
    figures = estimates(found.scorer, Resampling(found.labels, found.groups))
    if split == "test":
        with translated(bench.tracking_uri, f"Run {record.run_id}"):
            for name in ("accuracy", "auc"):
                bench.registry.client.log_metric(record.run_id, f"test_{name}", figures[name].value)
    dropped = _lost(asked, of, record.set, split) + len(of.of(split)) - len(found.labels)
    return Scored(at=now(), images=len(found.labels), dropped=dropped, accuracy=figures["accuracy"], auc=figures["auc"])


def answered(bench: Bench, of: Manifest, record: Record, split: Split) -> Answered:
    """Raises NotFound before `score` was called."""
    key = evaluation_key(record.bundle_digest, record.dataset_id, split, "answers.npz")
    answers = Answers.from_npz(bench.objects.get(key))
    number = {label: k for k, label in enumerate(of.classes)}  # the card's order, too
    labels = np.array([number[of.rows[row].label] for row in answers.rows], dtype=np.int64)
    groups = clusters([of.rows[row].group for row in answers.rows])
    return Answered(answers.probabilities, labels, of.classes, groups)


def note_reading(bench: Bench, record: Record) -> None:
    """Before the reading, so that none can be made in secret by stopping in time."""
    file, at = bench.folder / "readings.jsonl", now().isoformat(timespec="seconds")
    line = {"at": at, **record.model_dump(include={"set", "seed", "cutmix", "run_id", "dataset_id", "git_commit"})}
    with file.open("a") as readings:
        readings.write(json.dumps(line) + "\n")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    times = [line["at"] for line in lines if line["run_id"] == record.run_id]
    with translated(bench.tracking_uri, f"Run {record.run_id}"):
        bench.registry.client.set_tag(record.run_id, READINGS_TAG, f"{len(times)}, the first at {times[0]}")


def _lost(asked: Asked, of: Manifest, name: str, split: Split) -> int:
    """Images that the file has and the data set has not: of the test split where the file names one."""
    inside = content(asked.data / SETS[name].file)
    if split == "test" and inside.test is not None:
        return inside.test - len(of.of("test"))
    return inside.images - len(of.rows)


def _in_silence(step: str, done: int, total: int) -> None:
    """A `Progress` of a few seconds."""
