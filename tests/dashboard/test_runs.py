"""What MLflow knows about versions and runs."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from medloop.errors import NotFound, TrackingUnavailable
from medloop.registry import Registry
from medloop_dashboard import runs

from .studio import Studio


@pytest.fixture
def registry(studio: Studio) -> Registry:
    return Registry(studio.tracking_uri)


def test_versions_come_newest_first_with_their_metrics(registry: Registry, studio: Studio) -> None:
    rows = runs.version_rows(registry, "tiny")
    assert [(row.version, row.aliases) for row in rows] == [
        ("3", ("challenger",)),
        ("2", ("champion",)),
        ("1", ("previous",)),
    ]
    assert {row.dataset_id for row in rows} == {studio.manifest.id}
    assert rows[0].metrics["test_accuracy"] == 0.875
    assert rows[1].metrics == {}


def test_a_version_outlives_its_run(studio: Studio, tmp_path: Path) -> None:
    copy = tmp_path / "mlflow.sqlite"
    shutil.copy(studio.database, copy)
    first, _, third = (version.run_id for version in studio.versions)
    # What `mlflow gc` leaves behind.
    with closing(sqlite3.connect(copy)) as database, database:
        database.execute("DELETE FROM runs WHERE run_uuid = ?", (first,))
    registry = Registry(f"sqlite:///{copy}")
    assert [row.run_id for row in runs.version_rows(registry, "tiny")][::2] == [third, ""]
    with pytest.raises(NotFound):
        runs.run_detail(registry, first)


def test_only_metrics_with_a_history_are_curves(registry: Registry, studio: Studio) -> None:
    detail = runs.run_detail(registry, studio.versions[2].run_id)
    assert detail.curves == {
        "train_loss": [(0, 0.9), (1, 0.5), (2, 0.2)],
        "val_loss": [(0, 1.0), (1, 0.6), (2, 0.4)],
        "val_accuracy": [(0, 0.5), (1, 0.8), (2, 0.9)],
    }
    assert detail.metrics["val_loss"] == 0.4
    assert detail.params == {"architecture": "tiny"}
    assert detail.status == "FINISHED"


def test_files_of_all_folders_are_listed_and_read(registry: Registry, studio: Studio) -> None:
    run_id = studio.versions[2].run_id
    found = {file.path: file.size for file in runs.artifact_files(registry, run_id)}
    assert {"bundle/model.onnx", "bundle/bundle.json", "evaluation/test/misclassified/00_dark_as_bright.png"} <= set(
        found
    )
    for path in ("bundle/bundle.json", "evaluation/test/predictions.csv"):
        assert len(runs.read_artifact(registry, run_id, path)) == found[path]


def test_what_is_missing_or_out_of_reach(registry: Registry, studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFound):
        runs.version_rows(registry, "unknown")
    with pytest.raises(NotFound):
        runs.read_artifact(registry, studio.versions[2].run_id, "evaluation/none.json")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingUnavailable):
        runs.version_rows(Registry("http://127.0.0.1:9"), "tiny")


def test_the_tree_holds_every_file_once_and_folders_sum_up() -> None:
    paths = ["MLmodel", "a/b/x.json", "a/b/y.json", "a/z", "c/x"]
    lines = runs.tree([runs.ArtifactFile(path, 10) for path in paths])
    assert lines == [
        (0, "MLmodel", 10),
        (0, "a/", 30),
        (1, "b/", 20),
        (2, "x.json", 10),
        (2, "y.json", 10),
        (1, "z", 10),
        (0, "c/", 10),
        (1, "x", 10),
    ]
