import json
import os
import signal
import subprocess
import sys
import threading
from errno import ENOSPC
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from medloop.data.manifest import Manifest, Row
from medloop.errors import Conflict, NotFound, TrackingUnavailable
from medloop.registry import TAG_DATASET, TAG_OUTCOME, Registry
from medloop.testing import free_port
from medloop_trainer.loop import Epoch
from medloop_trainer.scores import Scores
from medloop_trainer.spool import Entry, Spool
from medloop_trainer.track import Run, Waits, patiently, spool_path

EPOCHS = (
    Epoch(1, 1.5, Scores(1.2, 0.5, 0.7), 1.1, 3e-3, 400.0),
    Epoch(2, 0.9, Scores(0.8, 0.75, None), 0.7, 1e-5, 410.0),
    Epoch(3, 0.8, Scores(float("nan"), 0.75, 0.9), 0.7, 1e-6, 410.0),
)
RUN = "r" * 32
WAIT = 30.0  # seconds, for what happens at once unless something is broken
SHORT = 0.1  # seconds, for what cannot happen
Point = tuple[str, int, int, float]
"""Name, step, time, value."""


class FakeMlflow:
    """An MLflow that has one run, `RUN`, and takes its metrics over HTTP; it can go away and come back."""

    def __init__(self) -> None:
        self.port = free_port()
        self.points: list[Point] = []
        self.statuses: list[str] = []
        self.answering = True
        """Off, requests are carried out and the connection is closed without an answer."""
        self.took = threading.Condition()
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> "FakeMlflow":
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer({"run": {"info": {"run_id": RUN, "run_uuid": RUN, "experiment_id": "1"}, "data": {}}})

            def do_POST(self) -> None:
                fake.take(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self._answer({})

            def _answer(self, found: dict[str, Any]) -> None:
                if fake.answering:
                    body = json.dumps(found).encode()
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                """Nobody reads it."""

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def take(self, path: str, sent: dict[str, Any]) -> None:
        with self.took:
            for metric in sent.get("metrics", ()):
                point = (metric["key"], int(metric["step"]), int(metric["timestamp"]), float(metric["value"]))
                # Kept once, as MLflow's primary key makes it; repr, since no NaN equals another.
                if repr(point) not in {repr(known) for known in self.points}:
                    self.points.append(point)
            self.statuses += [sent["status"]] if "status" in sent else []
            self.took.notify_all()

    def steps(self, name: str) -> list[int]:
        return [step for key, step, *_ in self.points if key == name]

    def wait_for_steps(self, name: str, steps: list[int]) -> None:
        with self.took:
            assert self.took.wait_for(lambda: self.steps(name) == steps, WAIT), self.points


@pytest.fixture
def away() -> FakeMlflow:
    """Not there until it is entered."""
    return FakeMlflow()


@pytest.fixture
def remote(away: FakeMlflow, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return Registry(f"http://127.0.0.1:{away.port}")


def open_run(registry: Registry, spool: Spool, *, patience: float = WAIT, last_words: float = WAIT) -> Run:
    return Run(registry, RUN, spool, waits=Waits(interval=0.02, patience=patience, last_words=last_words))


def test_a_run_holds_what_was_logged(registry: Registry, home: Path) -> None:
    manifest = Manifest("phantoms", ("a", "b"), (row("a", "train"), row("b", "test")))
    run = Run.start(registry, "phantoms", manifest.id)
    run.log_params({"epochs": 2, "pretrained": None})
    run.log_dataset(manifest, "s3://user:secret@bucket/prefix")
    for epoch in EPOCHS:
        run.log_epoch(epoch)
    run.log_files({"recipe.json": "{}", "curves.png": b"..."})
    run.log_figures({"best_epoch": 2})
    run.finish()

    found = registry.client.get_run(run.id)
    assert found.info.status == "FINISHED"
    assert found.data.tags[TAG_DATASET] == manifest.id
    assert {"medloop.environment", "medloop.cpu", "medloop.memory_gib", "medloop.gpus"} <= found.data.tags.keys()
    assert found.data.params == {"epochs": "2", "pretrained": "None"}
    assert found.data.metrics["best_epoch"] == 2
    losses = registry.client.get_metric_history(run.id, "val_loss")
    assert [(metric.step, metric.value) for metric in losses][:2] == [(1, 1.2), (2, 0.8)]
    assert [metric.step for metric in registry.client.get_metric_history(run.id, "val_auc")] == [1, 3]
    assert found.inputs is not None
    [given] = found.inputs.dataset_inputs
    assert given.dataset.profile is not None
    assert (given.dataset.name, given.dataset.digest) == ("phantoms", manifest.id[:36])
    assert json.loads(given.dataset.source) == {"dataset_id": manifest.id, "objects": "s3://bucket/prefix"}
    assert json.loads(given.dataset.profile)["class_distribution"]["train"] == {"a": 1, "b": 0}
    files = [file.path for file in registry.client.list_artifacts(run.id, "training")]
    assert files == ["training/curves.png", "training/recipe.json"]
    assert not list((home / "tracking").iterdir()), "what has arrived needs no spool"


def row(label: str, split: Any) -> Row:
    return Row(label * 64, label * 64, label, split)


def test_a_second_run_joins_the_experiment(registry: Registry) -> None:
    runs = [Run.start(registry, "phantoms", "d" * 64) for _ in range(2)]
    assert len({registry.client.get_run(run.id).info.experiment_id for run in runs}) == 1


def test_a_stopped_run_says_why_and_goes_on_without_repeating_itself(
    registry: Registry, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run.start(registry, "phantoms", "d" * 64)
    run.log_params({"epochs": 3, "threads": 2})
    run.log_epoch(EPOCHS[0])
    with pytest.raises(Conflict, match=run.id):
        Run.resume(registry, run.id)
    run.abandon("KILLED", "stopped")
    found = registry.client.get_run(run.id)
    assert (found.info.status, found.data.tags[TAG_OUTCOME]) == ("KILLED", "stopped")

    run = Run.resume(registry, run.id)
    found = registry.client.get_run(run.id)
    assert found.info.status == "RUNNING"
    assert TAG_OUTCOME not in found.data.tags
    run.log_params({"epochs": 3, "threads": 8, "new": "x"})
    assert "threads is 8 now and was 2 when the run began" in caplog.text
    for epoch in EPOCHS:
        run.log_epoch(epoch)
    run.finish()
    assert registry.client.get_run(run.id).data.params == {"epochs": "3", "threads": "2", "new": "x"}
    history = registry.client.get_metric_history(run.id, "train_loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.5), (2, 0.9), (3, 0.8)]
    with pytest.raises(NotFound):
        Run.resume(registry, "absent")
    assert not list((home / "tracking").iterdir())


def test_every_metric_arrives_once_though_mlflow_goes_and_comes(
    away: FakeMlflow, remote: Registry, tmp_path: Path
) -> None:
    spool = Spool(spool_path(RUN, tmp_path))
    with away:
        run = open_run(remote, spool, patience=SHORT)
        run.log_epoch(EPOCHS[0])
        away.wait_for_steps("train_loss", [1])
        away.answering = False
        run.log_epoch(EPOCHS[1])  # taken, but nobody is told
        away.wait_for_steps("train_loss", [1, 2])
    run.log_epoch(EPOCHS[2])
    assert spool.path.read_bytes().count(b"train_loss") >= 2, "on disk before `log_epoch` returns"
    with pytest.raises(TrackingUnavailable, match="keeps it until then"):
        run.log_figures({"best_epoch": 2})
    away.answering = True
    with away:
        away.wait_for_steps("best_epoch", [0])
        run.finish()
    assert away.statuses[-1] == "FINISHED"
    assert [away.steps(name) for name in ("train_loss", "val_loss", "val_auc")] == [[1, 2, 3], [1, 2, 3], [1, 3]]
    assert not spool.path.exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from medloop_trainer.spool import Entry, Spool
spool = Spool(Path(sys.argv[1]))
for step in (1, 2, 3):
    spool.append(Entry(at=step, step=step, metrics={"train_loss": 1 / step}))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_run_left_is_delivered_by_the_next(
    away: FakeMlflow, remote: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left = spool_path(RUN, tmp_path)
    done = subprocess.run([sys.executable, "-c", KILLED, str(left)], check=False)
    assert done.returncode == -signal.SIGKILL
    with left.open("ab") as file:
        file.write(b"\0\0\n" + b'{"at": 4, "metr')  # what a power failure does to the end
    living = Spool(spool_path("living", tmp_path))
    living.append(Entry(at=1, metrics={"other": 1.0}))
    with away:
        run = open_run(remote, Spool(spool_path("next", tmp_path)))
        run.log_figures({"best_epoch": 1})
        run.finish()
    assert away.points[:3] == [("train_loss", 1, 1, 1.0), ("train_loss", 2, 2, 0.5), ("train_loss", 3, 3, 1 / 3)]
    assert "delivered what MLflow had not received of run " + RUN in caplog.text
    assert "cannot be read" in caplog.text
    assert not away.steps("other"), "another process is at that one"
    assert [path.name for path in (tmp_path / "tracking").iterdir()] == ["living.jsonl"]
    living.close()


def test_a_run_that_ends_without_mlflow_leaves_its_status_behind(
    away: FakeMlflow, remote: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = open_run(remote, Spool(spool_path(RUN, tmp_path)), last_words=SHORT)
    run.log_epoch(EPOCHS[0])
    run.abandon("FAILED", "training-failed: the loss was no number")
    assert "the next training delivers it" in caplog.text
    with away:
        later = open_run(remote, Spool(spool_path("later", tmp_path)))
        later.log_figures({"best_epoch": 1})
        later.abandon("KILLED", "stopped")
    assert away.steps("train_loss") == [1]
    assert away.statuses[0] == "FAILED"


def test_a_full_disk_does_not_stop_a_training(
    away: FakeMlflow, remote: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    run = open_run(remote, Spool(spool_path(RUN, tmp_path), write=full))
    for epoch in EPOCHS:
        run.log_epoch(epoch)
    assert "No space left on device); what waits for MLflow stays in memory" in caplog.text
    with away:
        away.wait_for_steps("train_loss", [1, 2, 3])
        run.finish()
    assert away.statuses[-1] == "FINISHED"


def test_what_mlflow_refuses_holds_up_nothing_else(registry: Registry, home: Path) -> None:
    first = Run.start(registry, "phantoms", "d" * 64)
    first.log_params({"epochs": 3})
    first.finish()
    run = Run(registry, first.id, Spool(spool_path(first.id)))
    run.log_params({"epochs": 4})  # MLflow lets nobody change a parameter
    run.log_epoch(EPOCHS[0])
    run.log_figures({"best_epoch": 1})
    run.finish()
    assert registry.client.get_run(first.id).data.metrics["train_loss"] == 1.5
    [kept] = (home / "tracking").iterdir()
    assert kept.suffix == ".refused"
    assert json.loads(kept.read_text())["params"] == {"epochs": "4"}


def test_what_is_left_of_a_run_that_mlflow_does_not_know_stays(
    registry: Registry, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = Spool(spool_path("f" * 32))
    foreign.append(Entry(at=1, metrics={"train_loss": 1.0}))
    foreign.close()
    run = Run.start(registry, "phantoms", "d" * 64)
    run.log_figures({"best_epoch": 1})
    run.finish()
    assert "Run ffff" in caplog.text
    assert [path.name for path in (home / "tracking").iterdir()] == [foreign.path.name]


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
