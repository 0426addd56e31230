"""The trainer as torchrun starts it: two processes, one run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from medloop.data.build import build_dataset
from medloop.data.manifest import Manifest
from medloop.data.sources import phantom_source
from medloop.registry import CHALLENGER, TAG_OUTCOME, Registry
from medloop.storage.objects import ObjectStore
from medloop_trainer.environment import TAG_LAUNCH
from medloop_trainer.progress import bars
from medloop_trainer.settings import TrainerSettings
from medloop_trainer.train import resume

# The trainer as it is called, but for the leader's bars: in epoch 2 they kill the process, the first time, and in
# epoch 3 they have torchrun stopped, as an orchestrator would.
DRIVER = """
import os, signal, sys
from medloop_trainer import __main__, progress

shown = int(sys.argv.pop(1))

class Deadly(progress.Bars):
    def __call__(self, step, done, total):
        again = os.environ["TORCHELASTIC_RESTART_COUNT"] == "1"
        if step == "training" and done > shown and not again:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == "training" and done > 2 * shown:
            os.kill(os.getppid(), signal.SIGTERM)

progress.Bars = Deadly
__main__.main()
"""


@pytest.fixture
def dataset(objects: ObjectStore) -> Manifest:
    return build_dataset(phantom_source(per_class=12, size=28, seed=0), objects).manifest


@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(os.name != "posix", reason="torchrun ends its processes by signals")
def test_killed_then_stopped_then_resumed_it_is_one_run_and_one_version(
    dataset: Manifest, registry: Registry, objects: ObjectStore, tmp_path: Path
) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    shown = len(dataset.of("train"))  # in an epoch
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    options = ["--dataset-id", dataset.id, "--epochs", "3", "--batch-size", "8", "--budget-minutes", "5"]
    command = [*torchrun, str(driver), str(shown), "train", "--model", "phantoms", *options]
    environment = os.environ | {"MEDLOOP_CHECKPOINT_STEPS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, env=environment)
    assert "SignalException" in done.stderr, done.stderr

    experiment = registry.client.get_experiment_by_name("phantoms")
    assert experiment is not None
    [run] = registry.client.search_runs([experiment.experiment_id])
    assert run.info.status == "KILLED", done.stderr
    assert "was stopped after step" in run.data.tags[TAG_OUTCOME]
    assert run.data.tags[TAG_LAUNCH]
    assert run.data.params["processes"] == "2"
    assert "going on after step" in done.stderr, "started anew it trains no second run"

    with bars(False) as hidden:  # one process goes on where two stood
        result = resume(TrainerSettings(), run.info.run_id, "phantoms", hidden)
    assert (result.version, result.epochs) == ("1", 3)
    assert [m.step for m in registry.client.get_metric_history(run.info.run_id, "val_loss")] == [1, 2, 3]
    version = registry.at_alias("phantoms", CHALLENGER)
    assert version is not None
    assert version.run_id == run.info.run_id
    assert not list(objects.list("training/"))
