"""The run in MLflow: everything needed to tell later what was trained, on what, how, and how it went."""

import io
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from medloop.errors import NotFound, TrackingUnavailable
from medloop.registry import BUNDLE_PATH, TAG_DATASET, TAG_OUTCOME, Registry, translated

if TYPE_CHECKING:
    from medloop_trainer.loop import Epoch

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

TRAINING_PATH = "training"
"""Where the trainer's own files lie among the run's artifacts."""
PATIENCE = 300.0
"""Seconds that a finished training waits for MLflow to come back: what was computed is worth it."""
_PACKAGES = ("medloop", "torch", "torchvision", "onnx", "onnxruntime", "numpy", "pillow", "mlflow-skinny", "mlflow")
_GIT_COMMIT = "mlflow.source.git.commit"  # MLflow shows it under this name


class Run:
    """One MLflow run. Metrics are sent by a thread of their own, so that the loop never waits for them."""

    def __init__(self, registry: Registry, run_id: str) -> None:
        self.id = run_id
        self._registry = registry
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="medloop-metrics")
        self._unsent: list[tuple[int, int, dict[str, float]]] = []
        self._sending: list[Future[None]] = []

    @classmethod
    def start(cls, registry: Registry, model: str, dataset_id: str) -> Self:
        """Open a run in the experiment named after `model`; raises TrackingUnavailable when MLflow does not answer."""
        from mlflow.exceptions import MlflowException

        client = registry.client
        with translated(registry.tracking_uri, f"Experiment {model}"):
            try:
                client.create_experiment(model)
            except MlflowException as exc:
                if exc.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            experiment = client.get_experiment_by_name(model)
            if experiment is None:
                raise NotFound(f"The MLflow experiment {model} was deleted; restore it or choose another name.")
            tags = {TAG_DATASET: dataset_id, "mlflow.source.name": "medloop_trainer"}
            if (commit := git_commit()) is not None:
                tags[_GIT_COMMIT] = commit
            name = f"{model}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
            return cls(registry, client.create_run(experiment.experiment_id, tags=tags, run_name=name).info.run_id)

    def log_params(self, params: Mapping[str, object]) -> None:
        from mlflow.entities import Param

        self._call(
            lambda: self._registry.client.log_batch(self.id, params=[Param(k, str(v)) for k, v in params.items()])
        )

    def log_epoch(self, epoch: "Epoch") -> None:
        """Send an epoch's figures soon; returns at once."""
        figures = {
            "train_loss": epoch.train_loss,
            "val_loss": epoch.val.loss,
            "val_accuracy": epoch.val.accuracy,
            "learning_rate": epoch.learning_rate,
            "images_per_second": epoch.images_per_second,
        }
        if epoch.val.auc is not None:
            figures["val_auc"] = epoch.val.auc
        self._unsent.append((epoch.number, time.time_ns() // 1_000_000, figures))
        self._sending.append(self._sender.submit(self._send))

    def log_figures(self, figures: Mapping[str, float]) -> None:
        """Send figures of the whole run and wait until they, and all before, have arrived."""
        self._unsent.append((0, time.time_ns() // 1_000_000, dict(figures)))
        self._sender.shutdown()
        for done in self._sending:
            # An epoch that could not be sent is still in the list: the last attempt decides.
            if (failure := done.exception()) is not None:
                log.warning("metrics were late: %s", failure)
        self._call(self._send)

    def log_files(self, files: Mapping[str, str | bytes]) -> None:
        """Keep small files, by name, under `training/`."""
        import tempfile

        with tempfile.TemporaryDirectory(prefix="medloop-") as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content.encode() if isinstance(content, str) else content)
            self._call(lambda: self._registry.client.log_artifacts(self.id, folder, TRAINING_PATH))

    def log_bundle(self, folder: Path) -> None:
        self._call(lambda: self._registry.client.log_artifacts(self.id, str(folder), BUNDLE_PATH))

    def finish(self) -> None:
        self._call(lambda: self._registry.client.set_terminated(self.id))

    def abandon(self, status: str, outcome: str) -> None:
        """Mark the run `FAILED` or `KILLED`, and say why; without MLflow that stays unsaid."""
        self._sender.shutdown(cancel_futures=True)
        try:
            with translated(self._registry.tracking_uri, f"Run {self.id}"):
                self._registry.client.set_tag(self.id, TAG_OUTCOME, outcome)
                self._registry.client.set_terminated(self.id, status)
        except TrackingUnavailable as exc:
            log.warning("the run could not be marked %s: %s", status, exc)

    def _send(self) -> None:
        from mlflow.entities import Metric

        count = len(self._unsent)
        metrics = [
            Metric(name, value, at, step)
            for step, at, figures in self._unsent[:count]
            for name, value in figures.items()
        ]
        with translated(self._registry.tracking_uri, f"Run {self.id}"):
            self._registry.client.log_batch(self.id, metrics=metrics)
        del self._unsent[:count]

    def _call(self, work: Callable[[], Answer]) -> Answer:
        return patiently(self._registry.tracking_uri, work)


def patiently(tracking_uri: str, work: Callable[[], Answer], patience: float = PATIENCE, pause: float = 2.0) -> Answer:
    """Do `work` on MLflow, again and again for up to `patience` seconds while it does not answer.

    Raises TrackingUnavailable after that.
    """
    end = time.monotonic() + patience
    while True:
        try:
            with translated(tracking_uri):
                return work()
        except TrackingUnavailable as exc:
            if time.monotonic() + pause > end:
                raise
            log.warning("waiting for MLflow: %s", exc)
            time.sleep(pause)


def git_commit() -> str | None:
    """The commit of the checkout this code runs from; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def package_versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # mlflow beside mlflow-skinny is not everywhere
            continue
    return found


def curves_png(epochs: "tuple[Epoch, ...]") -> bytes:
    """Loss, validation accuracy and learning rate by epoch."""
    from matplotlib.figure import Figure  # without pyplot, which keeps global state and looks for a display

    figure = Figure(figsize=(12, 3.5), dpi=100, layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    numbers = [epoch.number for epoch in epochs]
    loss.plot(numbers, [epoch.train_loss for epoch in epochs], marker=".", label="train (mixed, smoothed targets)")
    loss.plot(numbers, [epoch.val.loss for epoch in epochs], marker=".", label="val")
    loss.set(title="loss", xlabel="epoch")
    loss.legend()
    accuracy.plot(numbers, [epoch.val.accuracy for epoch in epochs], marker=".")
    accuracy.set(title="val accuracy", xlabel="epoch")
    rate.plot(numbers, [epoch.learning_rate for epoch in epochs], marker=".")
    rate.set(title="learning rate at the end", xlabel="epoch")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
