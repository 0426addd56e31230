"""A run whose training is done again."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from medloop.errors import InvalidRequest, NotFound
from medloop.registry import CHALLENGER, TAG_OUTCOME
from medloop_trainer.__main__ import app
from medloop_trainer.original import TAG_REPRODUCES, differences, read_original
from medloop_trainer.recipe import ParentVersion
from medloop_trainer.reproduce import Reproduction, reproduce
from typer.testing import CliRunner

from .lineage import HiddenBars, Lineage


def with_recipe(lineage: Lineage, tmp_path: Path, changes: Mapping[str, object]) -> str:
    """A run that logged what the champion's did, but another recipe."""
    client, source = lineage.registry.client, lineage.trained.run_id
    found = client.get_run(source)
    run_id = str(client.create_run(found.info.experiment_id).info.run_id)
    for folder in ("training", "bundle"):
        client.download_artifacts(source, folder, str(tmp_path))
    path = tmp_path / "training" / "recipe.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(changes)))
    for folder in ("training", "bundle"):
        client.log_artifacts(run_id, str(tmp_path / folder), folder)
    for name, value in found.data.metrics.items():
        client.log_metric(run_id, name, value)
    for name in ("val_loss", "val_accuracy", "val_auc", "judged_by"):
        for metric in client.get_metric_history(source, name):
            client.log_metric(run_id, name, metric.value, step=metric.step)
    client.set_terminated(run_id)
    return run_id


def test_on_the_same_machine_it_is_equal_to_the_bit_and_registers_nothing(lineage: Lineage) -> None:
    registry, original = lineage.registry, lineage.trained.run_id
    called = CliRunner().invoke(app, ["reproduce", original])
    assert called.exit_code == 0, called.output
    found = Reproduction.model_validate_json(called.stdout.splitlines()[-1])
    assert (found.weights_equal, found.max_difference, found.reproduces) == (True, 0, original)
    assert (found.epochs.then, found.epochs.now) == (2, 2)
    assert {name: figure.difference for name, figure in found.figures.items()} == dict.fromkeys(found.figures, 0)
    assert found.figures.keys() == {"best_val_loss", "best_val_accuracy", "best_epoch", "temperature"}
    assert found.curves.keys() == {"val_loss", "val_accuracy", "val_auc", "judged_by"}

    run = registry.client.get_run(found.run_id)
    assert (run.info.status, run.data.tags[TAG_REPRODUCES]) == ("FINISHED", original)
    assert run.data.tags[TAG_OUTCOME] == f"reproduces run {original} to the bit"
    files = {file.path for file in registry.client.list_artifacts(found.run_id, "training")}
    assert files == {f"training/{name}" for name in ("recipe.json", "curves.png", "reproduction.json")}
    assert [version.run_id for version in registry.versions("phantoms")] == [original]
    assert registry.at_alias("phantoms", CHALLENGER) is None
    assert not list(lineage.objects.list("training/")), "a checkpoint could be resumed, and registered"
    with pytest.raises(InvalidRequest, match=f"reproduces run {original} itself"):
        reproduce(lineage.settings, found.run_id, HiddenBars())


def test_another_seed_is_told_as_different(lineage: Lineage, tmp_path: Path) -> None:
    run_id = with_recipe(lineage, tmp_path, {"seed": 4})
    called = CliRunner().invoke(app, ["reproduce", run_id, "--max-difference", "1e-9"])
    assert called.exit_code == 8, called.output
    found = Reproduction.model_validate_json(called.stdout.splitlines()[-1])
    assert not found.weights_equal
    assert found.weights_then != found.weights_now
    assert found.max_difference >= found.curves["val_loss"].max_difference > 0
    assert f"but validation figures differ by up to {found.max_difference:.2g}" in found.sentence


def test_what_differs_now_is_named(lineage: Lineage) -> None:
    original = read_original(lineage.registry, lineage.trained.run_id)
    tags = {**original.tags, "mlflow.source.git.commit": "c" * 40, "mlflow.source.git.dirty": "false"}
    same = replace(original, tags=tags)
    packages = original.card.packages
    assert differences(same, original.params, packages, tags) == []
    params = {**original.params, "threads": 99, "new": 1}
    found = differences(same, params, packages | {"torch": "1.0"}, tags | {"mlflow.source.git.dirty": "true"})
    assert {(each.what, each.then, each.now) for each in found} == {
        ("git", "c" * 40, "c" * 40 + " with changes"),
        ("torch", packages["torch"], "1.0"),
        ("threads", original.params["threads"], "99"),
    }


def test_what_cannot_be_reproduced_is_refused(lineage: Lineage, tmp_path: Path) -> None:
    def refused(run_id: str, error: type[Exception], why: str) -> None:
        with pytest.raises(error, match=why):
            reproduce(lineage.settings, run_id, HiddenBars())

    client = lineage.registry.client
    experiment = client.get_run(lineage.trained.run_id).info.experiment_id
    trial = client.create_run(experiment, tags={TAG_OUTCOME: "a trial"}).info.run_id
    refused("0" * 32, NotFound, "is not in MLflow")
    refused(trial, InvalidRequest, r"made no model version \(a trial\)")
    client.delete_tag(trial, TAG_OUTCOME)
    refused(trial, InvalidRequest, r"made no model version \(running\)")
    client.set_terminated(trial)
    refused(trial, InvalidRequest, r"has no training/recipe\.json")
    file = with_recipe(lineage, tmp_path / "file", {"pretrained": "file:chest.pth"})
    refused(file, InvalidRequest, r"began with the weights in chest\.pth; name that file: --pretrained")
    gone = ParentVersion(model="phantoms", version="99", run_id="a" * 32, bundle_digest="b" * 64)
    orphan = with_recipe(lineage, tmp_path / "orphan", {"parent": gone.model_dump()})
    refused(orphan, NotFound, "went on from phantoms version 99, which cannot be had as it was then")
