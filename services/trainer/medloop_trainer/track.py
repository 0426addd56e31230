"""The run in MLflow: everything needed to tell later what was trained, on what, how, and how it went.

While a training runs nothing here waits for MLflow: what is tracked goes into the spool and is delivered from there by
a thread, when MLflow answers; what is left when the process ends, by `Run.resume` or when the next training starts.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from medloop.errors import NotFound, TrackingUnavailable
from medloop.registry import BUNDLE_PATH, TAG_DATASET, TAG_OUTCOME, Registry, translated
from medloop.settings import HomeSettings, mask_url

from medloop_trainer.curves import curves_png, epoch_metrics
from medloop_trainer.delivery import INTERVAL, Courier, deliver
from medloop_trainer.environment import environment_tags, git_commit, package_versions
from medloop_trainer.spool import SUFFIX, DatasetInput, Entry, Spool

if TYPE_CHECKING:
    from medloop.data.manifest import Manifest

    from medloop_trainer.loop import Epoch

__all__ = ["PATIENCE", "Run", "curves_png", "git_commit", "package_versions", "patiently"]

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

TRAINING_PATH = "training"
"""Where the trainer's own files lie among the run's artifacts."""
PATIENCE = 300.0
"""Seconds that a finished training waits for MLflow to come back: what was computed is worth it."""
_DIGEST_DIGITS = 36  # MLflow's limit


@dataclass(frozen=True, slots=True)
class Waits:
    """Seconds: `interval` between two batches, `patience` of a finished training, and `last_words` of a process that
    ends, for MLflow to take the run's status: it may have been told to stop, and the spool has it."""

    interval: float = INTERVAL
    patience: float = PATIENCE
    last_words: float = 10.0


class Run:
    """One MLflow run, from `start` or `resume` to `finish` or `abandon`.

    `log_params`, `log_dataset` and `log_epoch` return at once and never fail for MLflow or the disk.
    """

    def __init__(
        self,
        registry: Registry,
        run_id: str,
        spool: Spool,
        *,
        params: Mapping[str, str] | None = None,
        epochs: Iterable[int] = (),
        waits: Waits = Waits(),
    ) -> None:
        """`params` and the numbers of `epochs` are what MLflow has of the run already."""
        # Standard output is the result's.
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        self.id = run_id
        self._registry, self._spool, self._waits = registry, spool, waits
        self._params, self._epochs = dict(params or {}), set(epochs)
        self.courier = Courier(registry, run_id, spool, interval=waits.interval)

    @classmethod
    def start(
        cls,
        registry: Registry,
        model: str,
        dataset_id: str,
        *,
        home: Path | None = None,
        name: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Self:
        """Open a run in the experiment named after `model`; `home` is `MEDLOOP_HOME` by itself. Raises
        TrackingUnavailable when MLflow does not answer."""
        run_id = create_run(registry, model, dataset_id, name=name, tags=tags)
        return cls(registry, run_id, Spool(spool_path(run_id, home)))

    @classmethod
    def resume(cls, registry: Registry, run_id: str, *, home: Path | None = None) -> Self:
        """Go on with a run that was stopped: what is left of it is delivered first, and it runs again in MLflow. Epochs
        that MLflow has already are not tracked twice.

        Raises NotFound, TrackingUnavailable, Conflict when another process is at it, and StorageFull or
        StorageUnavailable for the home folder.
        """
        client = registry.client
        with translated(registry.tracking_uri, f"Run {run_id}"):
            client.get_run(run_id)
        spool = Spool(spool_path(run_id, home))
        spool.claim()
        try:
            deliver(registry, run_id, spool)
            with translated(registry.tracking_uri, f"Run {run_id}"):
                found = client.get_run(run_id).data
                history = client.get_metric_history(run_id, "train_loss")
                if TAG_OUTCOME in found.tags:
                    client.delete_tag(run_id, TAG_OUTCOME)
                client.update_run(run_id, status="RUNNING")
        except BaseException:
            spool.close()
            raise
        run = cls(registry, run_id, spool, params=found.params, epochs=[metric.step for metric in history])
        run._append(Entry(at=_now(), tags=environment_tags()))
        return run

    def log_params(self, params: Mapping[str, object]) -> None:
        """Add parameters. What the run has already stays, as MLflow wants it; a different value is told in the log."""
        given = {name: str(value) for name, value in params.items()}
        for name in given.keys() & self._params.keys():
            if given[name] != self._params[name]:
                log.warning("%s is %s now and was %s when the run began", name, given[name], self._params[name])
        new = {name: value for name, value in given.items() if name not in self._params}
        self._params |= new
        self._append(Entry(at=_now(), params=new))

    def log_dataset(self, manifest: "Manifest", objects_url: str) -> None:
        """Name the data set version as the run's input, with its images by split and class."""
        counts = manifest.counts()
        found = DatasetInput(
            name=manifest.name,
            digest=manifest.id[:_DIGEST_DIGITS],
            source_type="medloop",
            source=json.dumps({"dataset_id": manifest.id, "objects": mask_url(objects_url)}),
            columns=json.dumps({"classes": manifest.classes}),
            profile=json.dumps({"num_rows": len(manifest.rows), "class_distribution": counts}),
        )
        self._append(Entry(at=_now(), dataset=found))

    def log_epoch(self, epoch: "Epoch") -> None:
        """Track every number of an epoch; of a resumed run, one that MLflow has already is left out the first time."""
        if epoch.number in self._epochs:
            self._epochs.remove(epoch.number)
        else:
            self._append(Entry(at=_now(), step=epoch.number, metrics=epoch_metrics(epoch)))

    def log_figures(self, figures: Mapping[str, float]) -> None:
        """Track figures of the whole run and wait until they, and all before, have arrived.

        Raises TrackingUnavailable when MLflow stays away; nothing is lost then.
        """
        self._append(Entry(at=_now(), metrics=dict(figures)))
        if not self.courier.drain(self._waits.patience):
            raise TrackingUnavailable(
                f"MLflow did not take what was tracked within {self._waits.patience:.0f} s; bring it back: "
                f"{self._spool.path} keeps it until then."
            ) from self.courier.problem

    def log_files(self, files: Mapping[str, str | bytes]) -> None:
        """Keep small files, by name, under `training/`."""
        import tempfile

        with tempfile.TemporaryDirectory(prefix="medloop-") as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content.encode() if isinstance(content, str) else content)
            self._call(lambda: self._registry.client.log_artifacts(self.id, folder, TRAINING_PATH))

    def log_bundle(self, folder: Path) -> None:
        self._call(lambda: self._registry.client.log_artifacts(self.id, str(folder), BUNDLE_PATH))

    def finish(self, outcome: str | None = None) -> None:
        """Mark the run `FINISHED`, and say why it registers nothing if it does not; while MLflow is away that is left
        to the spool."""
        self._end(Entry(at=_now(), tags={} if outcome is None else {TAG_OUTCOME: outcome}, status="FINISHED"))

    def abandon(self, status: str, outcome: str) -> None:
        """Mark the run `FAILED` or `KILLED`, and say why; while MLflow is away that is left to the spool."""
        self._end(Entry(at=_now(), tags={TAG_OUTCOME: outcome}, status=status))

    def _end(self, entry: Entry) -> None:
        self._append(entry)
        if not self.courier.drain(self._waits.last_words):
            log.warning("MLflow has not all of the run; the next training delivers it from %s", self._spool.path)
        self.courier.stop()
        self._spool.close()

    def _append(self, entry: Entry) -> None:
        self._spool.append(entry)
        self.courier.notice()

    def _call(self, work: Callable[[], Answer]) -> Answer:
        return patiently(self._registry.tracking_uri, work)


def create_run(
    registry: Registry, model: str, dataset_id: str, *, name: str | None = None, tags: Mapping[str, str] | None = None
) -> str:
    """A new run of the experiment named after `model`, which is made if need be: its id. Raises TrackingUnavailable,
    and NotFound when the experiment was deleted."""
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
        told = {TAG_DATASET: dataset_id, "mlflow.source.name": "medloop_trainer", **environment_tags(), **(tags or {})}
        name = name or f"{model}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
        return str(client.create_run(experiment.experiment_id, tags=told, run_name=name).info.run_id)


def spool_path(run_id: str, home: Path | None = None) -> Path:
    return (home or HomeSettings().home) / "tracking" / f"{run_id}{SUFFIX}"


def _now() -> int:
    return time.time_ns() // 1_000_000


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
