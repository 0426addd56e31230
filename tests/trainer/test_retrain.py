"""A champion that goes on learning, on a new version of its data."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml  # type: ignore[import-untyped]  # ships no types
from medloop.bundle import ARCHITECTURE, write_card
from medloop.data.manifest import CORRECTION, Manifest
from medloop.errors import InvalidDataset, InvalidRequest, NotFound, Preempted, TrackingUnavailable, UntrustedModel
from medloop.nets import rebuild
from medloop.registry import CHALLENGER, CHAMPION, TAG_DATASET, TAG_DIGEST
from medloop.testing import free_port, register_bundle, tiny_bundle
from medloop.vision.prepare import PreparationSpec
from medloop_trainer.__main__ import app
from medloop_trainer.dataset import Material, gather
from medloop_trainer.device import choose_device
from medloop_trainer.learn import images_of, set_up
from medloop_trainer.original import TAG_REPRODUCES
from medloop_trainer.recipe import TAG_PARENT_VERSION, Options
from medloop_trainer.reproduce import reproduce
from medloop_trainer.retrain import Origin, find_champion, learnt_already, retrain
from medloop_trainer.sampler import Sampler
from medloop_trainer.stop import Stop
from medloop_trainer.train import resume
from typer.testing import CliRunner

from .lineage import OPTIONS, HiddenBars, Lineage

RETRAIN = Path(__file__).resolve().parents[2] / "k8s" / "base" / "trainer" / "retrain.yaml"


@pytest.fixture(scope="module")
def champion(lineage: Lineage) -> Origin:
    return find_champion(lineage.registry, "phantoms", lineage.settings.home.bundles_dir)


def gathered(lineage: Lineage, champion: Origin) -> Material:
    def choose(manifest: Manifest) -> PreparationSpec:
        return champion.preparation(manifest, lineage.objects)

    return gather(lineage.objects, lineage.second.id, "phantoms", choose, lineage.settings.home.cache_dir)


def test_it_starts_as_the_champion_and_shows_corrections_more_often(lineage: Lineage, champion: Origin) -> None:
    material = gathered(lineage, champion)
    options = Options.checked(batch_size=8, correction_weight=3)
    network, recipe = set_up(material, options, choose_device(), origin=champion)
    assert material.spec == champion.bundle.card.preparation
    pixels = material.cache.images[material.rows.val]
    np.testing.assert_array_equal(network.run(pixels)[0], rebuild(champion.bundle).run(pixels)[0])

    images = images_of(material, recipe.correction_weight)
    sampler = Sampler(images.labels[images.train], recipe)
    first_pass = images.train[np.concatenate([sampler.batch(step) for step in range(sampler.batches)])]
    shown = np.bincount(first_pass, minlength=len(lineage.second.rows))
    expected = [0 if row.split != "train" else 3 if row.source == CORRECTION else 1 for row in lineage.second.rows]
    assert shown.tolist() == expected, "old images are replayed too"
    assert recipe.steps_per_epoch == sum(expected) // 8


def test_it_registers_a_challenger_that_names_its_parent_and_can_be_stopped_and_reproduced(
    lineage: Lineage, tmp_path: Path
) -> None:
    stop = Stop()

    class Stopping(HiddenBars):
        def __call__(self, step: str, done: int, total: int) -> None:
            if step == "training" and done > total // 2:
                stop(signal.SIGTERM, None)

    with pytest.raises(Preempted) as stopped:
        retrain(lineage.settings, lineage.second.id, "phantoms", Options.checked(**OPTIONS), Stopping(), stop)
    run_id = stopped.value.detail.rpartition(" ")[2].rstrip(".")
    done = resume(lineage.settings, run_id, "phantoms", HiddenBars())

    version = lineage.registry.at_alias("phantoms", CHALLENGER)
    assert version is not None
    assert version.version == done.version == "2"
    assert version.tags == {
        TAG_DIGEST: done.bundle_digest,
        TAG_DATASET: lineage.second.id,
        TAG_PARENT_VERSION: lineage.champion.version,
    }
    assert done.parent is not None
    run = lineage.registry.client.get_run(run_id).data
    assert done.parent.tags().items() <= run.tags.items()
    assert run.tags["medloop.parent_run_id"] == lineage.trained.run_id
    assert run.tags["medloop.parent_bundle_digest"] == lineage.trained.bundle_digest
    assert run.params["images_corrected"] == str(sum(row.source == CORRECTION for row in lineage.second.rows))
    assert run.params["correction_weight"] == "4"
    # From its parent's bundle, without a stop: to the bit what the stopped run came to.
    again = reproduce(lineage.settings, run_id, HiddenBars())
    assert again.weights_equal
    assert (again.max_difference, again.epochs.then, again.epochs.now) == (0, 2, 2)
    assert lineage.registry.client.get_run(again.run_id).data.tags[TAG_REPRODUCES] == run_id
    assert [v.version for v in lineage.registry.versions("phantoms")] == ["2", "1"]


def test_the_weekly_job_trains_only_where_the_data_set_is_new(lineage: Lineage) -> None:
    job = yaml.safe_load(RETRAIN.read_text())["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    [arguments] = [each["args"] for each in job["containers"]]
    before = lineage.registry.versions("phantoms")
    learnt, new, nobody = (
        CliRunner().invoke(app, [*arguments, "--model", model, "--dataset-id", dataset_id])
        for model, dataset_id in (("phantoms", lineage.first.id), ("phantoms", "0" * 64), ("nobody", "0" * 64))
    )
    assert (learnt.exit_code, learnt.stdout) == (0, "")
    assert learnt.stderr == "Nothing to learn: phantoms version 1 learnt from this very data set version.\n"
    assert new.exit_code == NotFound.exit_status  # it went on, and there is no such version of the data set
    assert "0" * 16 in new.stderr
    assert nobody.exit_code == NotFound.exit_status
    assert lineage.registry.versions("phantoms") == before


def test_a_version_whose_training_was_lost_as_it_registered_does_not_keep_it_from_learning(lineage: Lineage) -> None:
    client, model, first = lineage.registry.client, "phantoms", lineage.first.id
    assert learnt_already(lineage.settings, model, first) == "1"
    run = lineage.registry.version(model, "1").run_id
    client.set_terminated(run, "KILLED")
    try:
        assert learnt_already(lineage.settings, model, first) is None
    finally:
        client.set_terminated(run, "FINISHED")


def test_it_goes_on_only_where_it_can(lineage: Lineage, champion: Origin) -> None:
    def refused(dataset: Manifest, why: str) -> None:
        with pytest.raises(InvalidDataset, match=why):
            champion.preparation(dataset, lineage.objects)

    rows = lineage.second.rows
    more = (*lineage.first.classes, "other")
    refused(lineage.version_of([*rows[:-1], replace(rows[-1], label="other")], more), "has the classes .*, other, and")
    learnt = next(row for row in lineage.first.of("train"))
    moved = [replace(row, split="test") if row.byte_hash == learnt.byte_hash else row for row in rows]
    refused(lineage.version_of(moved), "1 images that phantoms version 1 learnt from stand in a split")
    refused(Manifest("other", lineage.first.classes, rows), "which is no version of other")


def test_without_a_champion_nothing_is_begun(lineage: Lineage, monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(model: str) -> None:
        retrain(lineage.settings, lineage.second.id, model, Options.checked(**OPTIONS), HiddenBars())

    with pytest.raises(NotFound, match="has no champion to go on from; train first"):
        begun("nobody")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingUnavailable, match="MLflow does not answer"):
        begun("phantoms")


def test_a_champion_that_is_not_what_was_registered_or_not_known_here_is_refused(
    lineage: Lineage, champion: Origin, tmp_path: Path
) -> None:
    registry = lineage.registry
    forged = register_bundle(registry, tiny_bundle(tmp_path / "tiny", model="forged"))
    registry.set_tag("forged", forged.version, TAG_DIGEST, champion.bundle.digest[::-1])
    registry.set_alias("forged", CHAMPION, forged.version)
    with pytest.raises(UntrustedModel, match="not the expected one"):
        find_champion(registry, "forged", tmp_path / "bundles")

    folder = shutil.copytree(champion.bundle.folder, tmp_path / "bundle")
    known = json.loads((folder / ARCHITECTURE).read_text())
    (folder / ARCHITECTURE).write_text(json.dumps(known | {"id": "vision-zebra"}))
    card = champion.bundle.card.model_copy(update={"architecture": "vision-zebra"})
    with pytest.raises(InvalidRequest, match="phantoms version 1 is a vision-zebra, an architecture that this trainer"):
        replace(champion, bundle=write_card(folder, card)).network()
