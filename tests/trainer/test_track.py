import pytest
from medloop.errors import TrackingUnavailable
from medloop.registry import TAG_DATASET, TAG_OUTCOME, Registry
from medloop_trainer.loop import Epoch
from medloop_trainer.scores import Scores
from medloop_trainer.track import Run, curves_png, package_versions, patiently

EPOCHS = (
    Epoch(1, 1.5, Scores(1.2, 0.5, 0.7), 1.1, 3e-3, 400.0),
    Epoch(2, 0.9, Scores(0.8, 0.75, None), 0.7, 1e-5, 410.0),
)


def test_a_run_holds_what_was_logged(registry: Registry) -> None:
    run = Run.start(registry, "phantoms", "d" * 64)
    run.log_params({"epochs": 2, "pretrained": None})
    for epoch in EPOCHS:
        run.log_epoch(epoch)
    run.log_files({"recipe.json": "{}", "curves.png": curves_png(EPOCHS)})
    run.log_figures({"best_epoch": 2})
    run.finish()

    found = registry.client.get_run(run.id)
    assert found.info.status == "FINISHED"
    assert found.data.tags[TAG_DATASET] == "d" * 64
    assert found.data.params == {"epochs": "2", "pretrained": "None"}
    assert found.data.metrics["best_epoch"] == 2
    losses = registry.client.get_metric_history(run.id, "val_loss")
    assert [(metric.step, metric.value) for metric in losses] == [(1, 1.2), (2, 0.8)]
    assert [metric.step for metric in registry.client.get_metric_history(run.id, "val_auc")] == [1]
    assert [file.path for file in registry.client.list_artifacts(run.id, "training")] == [
        "training/curves.png",
        "training/recipe.json",
    ]


def test_a_second_run_joins_the_experiment(registry: Registry) -> None:
    runs = [Run.start(registry, "phantoms", "d" * 64) for _ in range(2)]
    assert len({registry.client.get_run(run.id).info.experiment_id for run in runs}) == 1


def test_an_abandoned_run_says_why(registry: Registry) -> None:
    run = Run.start(registry, "phantoms", "d" * 64)
    run.abandon("FAILED", "invalid-request: no such file")
    found = registry.client.get_run(run.id)
    assert (found.info.status, found.data.tags[TAG_OUTCOME]) == ("FAILED", "invalid-request: no such file")


def test_a_finished_training_waits_for_mlflow_to_come_back() -> None:
    attempts = 0

    def work() -> str:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            raise ConnectionError("refused")
        return "done"

    assert patiently("http://127.0.0.1:9", work, patience=5, pause=0.01) == "done"
    assert attempts == 3


def test_patience_ends() -> None:
    def work() -> None:
        raise ConnectionError("refused")

    with pytest.raises(TrackingUnavailable):
        patiently("http://127.0.0.1:9", work, patience=0.05, pause=0.01)


def test_the_versions_that_made_a_bundle_are_named() -> None:
    assert {"python", "medloop", "torch", "onnxruntime", "numpy"} <= package_versions().keys()


def test_curves_are_a_png() -> None:
    assert curves_png(EPOCHS).startswith(b"\x89PNG")
