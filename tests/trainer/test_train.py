"""The trainer as it is called: a process, a data set in objects, an MLflow."""

import gzip
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from medloop.bundle import load_reference, read_bundle
from medloop.data.build import build_dataset
from medloop.data.cache import open_cache
from medloop.data.manifest import Manifest, load_manifest
from medloop.data.sources import phantom_source
from medloop.engines import open_network
from medloop.errors import InvalidDataset, InvalidRequest, NotFound, StorageUnavailable, TrackingUnavailable
from medloop.nets import rebuild
from medloop.outliers import OutlierModel
from medloop.registry import CHALLENGER, TAG_DATASET, TAG_DIGEST, TAG_OUTCOME, Registry
from medloop.storage.objects import ObjectStore
from medloop.testing import free_port
from medloop_trainer.__main__ import app
from medloop_trainer.progress import bars
from medloop_trainer.publish import TrainingResult
from medloop_trainer.recipe import Options
from medloop_trainer.settings import TrainerSettings
from medloop_trainer.train import train
from safetensors.torch import save_file
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("one_thread")

COMMAND = [sys.executable, "-m", "medloop_trainer", "train", "--model", "phantoms"]


@pytest.fixture
def dataset(objects: ObjectStore) -> Manifest:
    return build_dataset(phantom_source(per_class=20, size=32, seed=0), objects).manifest


def run_in_process(dataset_id: str, model: str = "phantoms", **options: object) -> TrainingResult:
    with bars(False) as hidden:
        return train(TrainerSettings(), dataset_id, model, Options.checked(**options), hidden)


def test_a_data_set_version_becomes_a_challenger(
    dataset: Manifest, registry: Registry, home: Path, objects: ObjectStore, tmp_path: Path
) -> None:
    options = ["--epochs", "2", "--batch-size", "16"]
    done = subprocess.run(
        [*COMMAND, "--dataset-id", dataset.id, *options, "--result", str(tmp_path / "result.json"), "--progress"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "COLUMNS": "80"},
    )
    assert done.returncode == 0, done.stderr
    result = TrainingResult.model_validate_json(done.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(done.stdout.splitlines()[-1])
    assert result.seconds.keys() == {"cache", "train", "export", "register"}
    assert (result.epochs, result.dataset_id, result.version) == (2, dataset.id, "1")
    for told in ("opening", "decoding images", "training", "epoch 2/2, val", "exporting", "registering"):
        assert told in done.stderr
    assert not list((home / "training").iterdir()), "what is registered needs no second copy"

    version = registry.at_alias("phantoms", CHALLENGER)
    assert version is not None
    assert version.tags == {TAG_DIGEST: result.bundle_digest, TAG_DATASET: dataset.id}
    bundle = read_bundle(registry.download_bundle(version, tmp_path / "downloaded"))
    assert bundle.digest == result.bundle_digest
    check_bundle(bundle.folder, dataset, home, objects)
    check_run(registry, result)


def check_bundle(folder: Path, dataset: Manifest, home: Path, objects: ObjectStore) -> None:
    bundle = read_bundle(folder)
    network = open_network(bundle)
    assert network.check_golden().max_difference <= 1e-4
    card, train_rows = bundle.card, dataset.of("train")
    assert (card.classes, card.preparation.mode, card.preparation.size) == (dataset.classes, "L", 32)
    assert card.conformal.images == len(dataset.of("calibration"))
    reference = load_reference(bundle)
    assert {bytes(value).hex() for value in reference["hashes"]} == {row.byte_hash for row in train_rows}
    outliers = OutlierModel.load(bundle)
    assert outliers is not None
    assert len(outliers.training) == len(train_rows)
    assert outliers.threshold is None, "so few calibration images promise nothing"

    for key in objects.list("images/"):
        objects.delete(key)
    cache = open_cache(dataset, card.preparation, objects, home / "cache")  # the trainer made it with this very spec
    images = cache.images[cache.indices("test")]
    np.testing.assert_allclose(network.run(images).probabilities, rebuild(bundle).run(images)[0], atol=1e-4)


def check_run(registry: Registry, result: TrainingResult) -> None:
    run = registry.client.get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["architecture"] == "small-resnet"
    assert run.data.params["dataset_id"] == result.dataset_id
    assert run.data.params["seed"] == "0"
    assert len(registry.client.get_metric_history(result.run_id, "val_accuracy")) == 2
    assert run.data.metrics["best_val_accuracy"] == pytest.approx(result.val.accuracy)
    files = [file.path for file in registry.client.list_artifacts(result.run_id, "training")]
    assert files == [f"training/{n}" for n in ("class_distribution.json", "curves.png", "leaks.json", "recipe.json")]


@pytest.mark.usefixtures("tracking_uri")
def test_a_run_that_fails_says_why(dataset: Manifest, registry: Registry, home: Path) -> None:
    weights = home / "resnet50.safetensors"
    save_file({"conv1.weight": torch.zeros(64, 1, 3, 3)}, weights)
    with pytest.raises(InvalidRequest, match=r"resnet50\.safetensors are not resnet18's"):
        run_in_process(dataset.id, architecture="resnet18", pretrained=str(weights))
    experiment = registry.client.get_experiment_by_name("phantoms")
    assert experiment is not None
    [run] = registry.client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"
    assert "are not resnet18's; choose the --architecture they belong to" in run.data.tags[TAG_OUTCOME]
    assert not list((home / "training").iterdir())


@pytest.mark.usefixtures("tracking_uri")
def test_a_home_that_cannot_be_written_is_told_before_the_training(dataset: Manifest, home: Path) -> None:
    (home / "training").write_text("in the way")
    started = time.monotonic()
    with pytest.raises(StorageUnavailable, match="cannot be read or written"):
        run_in_process(dataset.id, epochs=5000)
    assert time.monotonic() - started < 60


@pytest.mark.usefixtures("tracking_uri")
def test_a_version_is_trained_in_its_own_lineage_only(dataset: Manifest) -> None:
    with pytest.raises(NotFound, match=f"Data set other has no version {dataset.id[:16]} in .*; build it with"):
        run_in_process(dataset.id, model="other")
    with pytest.raises(NotFound, match=r"Data set phantoms has no version 0000000000000000 in .*; build it with"):
        run_in_process("0" * 64)
    with pytest.raises(InvalidRequest, match="cannot name a model"):
        run_in_process(dataset.id, model="No Name")


@pytest.mark.usefixtures("tracking_uri")
def test_a_class_without_training_images_is_refused(dataset: Manifest, objects: ObjectStore) -> None:
    moved = [
        replace(row, split="test") if (row.label, row.split) == (dataset.classes[0], "train") else row
        for row in dataset.rows
    ]
    broken = Manifest("phantoms", dataset.classes, tuple(moved), parent=dataset.id)
    broken.save(objects)
    assert load_manifest(objects, broken.id, name="phantoms").id == broken.id
    with pytest.raises(InvalidDataset, match=f"no training image of {dataset.classes[0]}"):
        run_in_process(broken.id)


@pytest.mark.usefixtures("tracking_uri")
def test_a_data_set_that_changed_under_its_id_is_refused(dataset: Manifest, objects: ObjectStore) -> None:
    key = f"datasets/{dataset.id}/manifest.jsonl.gz"
    rows = gzip.decompress(objects.get(key)).replace(b'"split":"test"', b'"split":"train"', 1)
    objects.put(key, gzip.compress(rows))
    with pytest.raises(InvalidDataset, match="its rows do not give its id"):
        run_in_process(dataset.id)


def test_without_mlflow_it_stops_before_the_work(
    dataset: Manifest, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    done = CliRunner().invoke(app, ["train", "--model", "phantoms", "--dataset-id", dataset.id])
    assert done.exit_code == TrackingUnavailable.exit_status, done.output
    assert done.stderr.startswith("MLflow does not answer at")
    assert not (home / "cache").exists()
