"""Trainings that are cut off, and what becomes of them."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from medloop.bundle import WEIGHTS, read_bundle
from medloop.data.build import build_dataset
from medloop.data.manifest import Manifest
from medloop.data.sources import phantom_source
from medloop.errors import InvalidRequest, NotFound, Preempted
from medloop.registry import CHALLENGER, TAG_OUTCOME, Registry
from medloop.storage.objects import ObjectStore
from medloop.vision.prepare import PreparationSpec
from medloop_trainer import __main__ as command
from medloop_trainer.dataset import gather
from medloop_trainer.learn import Surroundings, begin
from medloop_trainer.progress import Bars
from medloop_trainer.recipe import Options
from medloop_trainer.settings import LoopSettings, TrainerSettings
from medloop_trainer.stop import Stop
from medloop_trainer.track import Run
from medloop_trainer.train import LATEST, resume, train
from rich.progress import Progress
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = {"epochs": 3, "batch_size": 8, "seed": 3}

# The trainer as it is called, but for its bars: they kill the process once so many images were shown.
DRIVER = """
import os, signal, sys
from medloop_trainer import __main__, progress

images = int(sys.argv.pop(1))

class Deadly(progress.Bars):
    def __call__(self, step, done, total):
        if step == "training" and done >= images:
            os.kill(os.getpid(), signal.SIGKILL)

progress.Bars = Deadly
__main__.main()
"""


class HiddenBars(Bars):
    def __init__(self) -> None:
        super().__init__(Progress(disable=True))


@pytest.fixture
def dataset(objects: ObjectStore) -> Manifest:
    return build_dataset(phantom_source(per_class=8, size=28, seed=0), objects).manifest


@pytest.fixture
def sigterm() -> Iterator[None]:
    """SIGTERM is handled as in the trainer's own process."""
    handler = signal.signal(signal.SIGTERM, command.stop)
    yield
    signal.signal(signal.SIGTERM, handler)
    command.stop.requested = False


def told_to_stop(images: int, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Result:
    """`train`, in this process, which gets SIGTERM after `images` images."""

    def tell(bars: Bars, step: str, done: int, total: int) -> None:
        if step == "training" and done >= images:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Bars, "__call__", tell)
        return CliRunner().invoke(command.app, ["train", "--model", "phantoms", *arguments])


def killed(images: int, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """`train`, in a process of its own, which is killed after `images` images."""
    words = [sys.executable, "-c", DRIVER, str(images), "train", "--model", "phantoms", *arguments]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)


def uninterrupted(dataset: Manifest, registry: Registry, objects: ObjectStore, home: Path) -> dict[str, torch.Tensor]:
    """The weights, calibrated temperature included, of a run without stops."""
    spec = PreparationSpec(mode="L", size=28)
    material = gather(objects, dataset.id, "phantoms", lambda _: spec, home / "cache")
    run = Run.start(registry, "phantoms", dataset.id)
    around = Surroundings(objects, run, HiddenBars(), Stop())
    trained = begin(material, Options.checked(**RECIPE), LoopSettings(), around)
    run.finish()
    return dict(trained.network.state_dict())


def only_run(registry: Registry) -> tuple[str, str, str | None]:
    """Id, status and outcome."""
    experiment = registry.client.get_experiment_by_name("phantoms")
    assert experiment is not None
    [run] = registry.client.search_runs([experiment.experiment_id])
    return run.info.run_id, run.info.status, run.data.tags.get(TAG_OUTCOME)


@pytest.mark.usefixtures("sigterm")
def test_stopped_then_killed_then_resumed_it_ends_with_the_weights_of_an_uninterrupted_run(
    dataset: Manifest,
    registry: Registry,
    objects: ObjectStore,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MEDLOOP_CHECKPOINT_STEPS", "2")
    shown = len(dataset.of("train"))  # in an epoch
    options = [part for name, value in RECIPE.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    stopped = told_to_stop(shown // 2, monkeypatch, "--dataset-id", dataset.id, *options)
    assert stopped.exit_code == Preempted.exit_status == 75, stopped.output
    run_id, status, outcome = only_run(registry)
    assert (status, outcome) == ("KILLED", stopped.stderr.splitlines()[-1])
    assert f"go on with --resume {run_id}" in stopped.stderr
    assert registry.state("phantoms") is None, "nothing half done is registered"

    done = killed(2 * shown, "--resume", LATEST)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert only_run(registry)[1] == "RUNNING"

    result = resume(TrainerSettings(), run_id, "phantoms", HiddenBars())
    assert (result.run_id, result.epochs) == (run_id, 3)
    assert only_run(registry) == (run_id, "FINISHED", None)
    assert [m.step for m in registry.client.get_metric_history(run_id, "val_loss")] == [1, 2, 3]
    assert not list(objects.list("training/")), "a registered run needs no checkpoints"
    assert not list((home / "training").iterdir())

    bundle = read_bundle(registry.download_bundle(registry.version("phantoms", result.version), tmp_path / "bundle"))
    registered, whole = load_file(bundle.folder / WEIGHTS), uninterrupted(dataset, registry, objects, home)
    assert registered.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(registered[name], whole[name])] == []


def test_what_was_computed_while_everything_was_away_is_registered_later(
    dataset: Manifest, registry: Registry, home: Path, tmp_path: Path
) -> None:
    """Objects go in the middle and do not come back; MLflow takes no artifacts in the end; then it does."""
    folder, gone = home / "objects", home / "gone"

    class WithoutObjects(HiddenBars):
        def __call__(self, step: str, done: int, total: int) -> None:
            if step == "training" and folder.is_dir():
                folder.rename(gone)
                folder.touch()

    (tmp_path / "mlruns").touch()  # in the way of artifacts
    options = Options.checked(batch_size=8, budget_minutes=0.02)
    with pytest.raises(OSError, match="mlruns"):
        train(TrainerSettings(), dataset.id, "phantoms", options, WithoutObjects())
    run_id, status, _ = only_run(registry)
    assert status == "FAILED"
    (tmp_path / "mlruns").unlink()

    with pytest.raises(InvalidRequest, match="trains phantoms, not other"):
        resume(TrainerSettings(), run_id, "other", HiddenBars())
    result = resume(TrainerSettings(), run_id, "phantoms", HiddenBars(), dataset_id=dataset.id)
    assert (result.run_id, list(result.seconds)) == (run_id, ["register"])
    version = registry.at_alias("phantoms", CHALLENGER)
    assert version is not None
    assert version.version == result.version == "1"
    assert only_run(registry)[1] == "FINISHED"

    # The budget was measured once, and is now a number of steps.
    recipe = json.loads((next(tmp_path.glob("mlruns/**/training/recipe.json"))).read_text())
    assert recipe["epochs"] == result.epochs
    assert registry.client.get_run(run_id).data.params["steps_per_epoch"] == str(recipe["steps_per_epoch"])

    folder.unlink()
    gone.rename(folder)
    with pytest.raises(NotFound, match="Nothing is left of any run of phantoms"):
        resume(TrainerSettings(), LATEST, "phantoms", HiddenBars())
    with pytest.raises(InvalidRequest, match=f"{run_id} came to its end"):
        resume(TrainerSettings(), run_id, "phantoms", HiddenBars())


def test_options_cannot_be_changed_in_a_run_that_goes_on() -> None:
    done = CliRunner().invoke(command.app, ["train", "--model", "phantoms", "--resume", "a" * 32, "--epochs", "9"])
    assert done.exit_code == InvalidRequest.exit_status
    assert "--epochs cannot be changed" in done.stderr
