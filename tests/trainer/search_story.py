"""A search as it is called: a data set in objects, an MLflow, trainings of seconds."""

import csv
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from medloop.data.build import build_dataset
from medloop.data.manifest import Manifest
from medloop.data.sources import phantom_source
from medloop.errors import Conflict, Preempted
from medloop.registry import TAG_OUTCOME, Registry
from medloop.storage.objects import ObjectStore
from medloop_trainer import __main__ as command
from medloop_trainer.progress import Bars
from medloop_trainer.search import Plan, SearchResult, search
from medloop_trainer.settings import TrainerSettings
from medloop_trainer.stop import Stop
from mlflow.entities import Run
from rich.progress import Progress
from typer.testing import CliRunner


class Impatient(Bars):
    """Asks to stop as soon as the search is over."""

    def __init__(self) -> None:
        super().__init__(Progress(disable=True))
        self.stop = Stop()

    def __call__(self, step: str, done: int, total: int) -> None:
        if step == "search" and done == total:
            self.stop.requested = True


@pytest.fixture
def dataset(objects: ObjectStore) -> Manifest:
    return build_dataset(phantom_source(per_class=8, size=28, seed=0), objects).manifest


def runs_of(registry: Registry, parent: str) -> list[Run]:
    """A study's trials, oldest first."""
    experiment = registry.client.get_experiment_by_name("phantoms")
    assert experiment is not None
    where = f"tags.`mlflow.parentRunId` = '{parent}'"
    found = registry.client.search_runs([experiment.experiment_id], where)
    return sorted(found, key=lambda run: int(run.data.tags["medloop.trial"]))


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """The handler of before, afterwards."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)
    command.stop.requested = False


def interrupt(bars: Bars, step: str, text: str) -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("ctrl_c", "one_thread")
def test_a_search_that_is_stopped_goes_on_and_trains_with_what_was_best(
    dataset: Manifest, registry: Registry, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["search", "--model", "phantoms", "--dataset-id", dataset.id, "--trials", "1", "--epochs", "2"]
    arguments += ["--seed", "3", "--result", str(home / "result.json"), "--no-progress"]
    with monkeypatch.context() as patched:
        patched.setattr(Bars, "note", interrupt)  # which is called after an epoch
        stopped = CliRunner().invoke(command.app, arguments)
    assert stopped.exit_code == Preempted.exit_status, stopped.output
    assert "stopped in trial 0; the same command goes on" in stopped.stderr

    command.stop.requested = False
    done = CliRunner().invoke(command.app, arguments)
    assert done.exit_code == 0, done.output
    before = SearchResult.model_validate_json(done.stdout.splitlines()[-1])
    assert before == SearchResult.model_validate_json((home / "result.json").read_text())
    assert (before.study, before.trials) == (f"phantoms-{dataset.id[:12]}", {"failed": 1, "complete": 1})
    assert " ".join(before.flags) in done.stderr
    assert before.best is not None
    assert before.best.judged_by == before.best.recipe_judged_by, "the first point is the recipe's own"
    first, again = runs_of(registry, before.run_id)
    assert (first.info.status, again.info.status) == ("KILLED", "FINISHED")
    assert first.data.params == again.data.params
    assert registry.client.get_run(before.run_id).info.status == "FINISHED"

    bars, given = Impatient(), {"epochs": 2, "seed": 3}
    with pytest.raises(Conflict, match="is of trials of other options"):
        search(TrainerSettings(), dataset.id, "phantoms", given | {"seed": 4}, Plan(), bars)
    with pytest.raises(Preempted, match="go on with --resume"):  # the training, after its first step
        search(TrainerSettings(), dataset.id, "phantoms", given, Plan(trials=2, train=True), bars, bars.stop)
    check_runs(registry, before, tmp_path)


def check_runs(registry: Registry, before: SearchResult, folder: Path) -> None:
    """After one trial more, and a training that was stopped."""
    assert registry.state("phantoms") is None, "trials are not registered"
    parent = registry.client.get_run(before.run_id)
    assert (parent.info.status, parent.info.run_name) == ("FINISHED", before.study)
    _, *trials = runs_of(registry, before.run_id)
    for run in trials:
        pruned = run.data.tags[TAG_OUTCOME].startswith("pruned")
        assert run.info.status == ("KILLED" if pruned else "FINISHED")
        epochs = [metric.step for metric in registry.client.get_metric_history(run.info.run_id, "judged_by")]
        assert epochs == ([1] if pruned else [1, 2])
    [table] = folder.glob(f"mlruns/**/{before.run_id}/artifacts/search/trials.csv")
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["state"] for row in rows] == ["failed", "complete", rows[2]["state"]]
    assert [row["run_id"] for row in rows[1:]] == [run.info.run_id for run in trials]
    ended = [number for number, row in enumerate(rows) if row["state"] == "complete"]
    best = min(ended, key=lambda number: float(rows[number]["judged_by"]))

    [training] = registry.client.search_runs([parent.info.experiment_id], order_by=["start_time DESC"], max_results=1)
    assert training.info.status == "KILLED"
    found, wanted = training.data.params, trials[best - 1].data.params
    for name in ("learning_rate", "batch_size", "label_smoothing", "cutmix_probability", "seed"):
        assert found[name] == wanted[name]
    assert found["epochs"] != "2", "how long trials are says nothing of the training"
