"""The run of a study in MLflow, which the trials' runs are children of.

Many processes write to it, so nothing of it is spooled: who has something to say waits for MLflow.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from medloop.errors import MedLoopError
from medloop.registry import TAG_OUTCOME, Registry, translated

from medloop_trainer.track import patiently
from medloop_trainer.train import how_it_ended

log = logging.getLogger(__name__)

SEARCH_PATH = "search"
"""Where a search's files lie among the artifacts of its run."""
TAG_PARENT = "mlflow.parentRunId"  # MLflow's name
TAG_STUDY = "medloop.study"


class Parent:
    """`busy` says whether processes are at work on the study: the last one closes the run."""

    def __init__(self, registry: Registry, run_id: str, busy: Callable[[], bool]) -> None:
        self._registry, self._run_id, self._busy = registry, run_id, busy

    @contextmanager
    def running(self) -> Iterator[None]:
        """Raises NotFound when the run was deleted, and TrackingUnavailable."""
        client = self._registry.client
        with translated(self._registry.tracking_uri, f"The search's run {self._run_id}"):
            if TAG_OUTCOME in client.get_run(self._run_id).data.tags:
                client.delete_tag(self._run_id, TAG_OUTCOME)
            client.update_run(self._run_id, status="RUNNING")
        try:
            yield
        except BaseException as exc:
            self._close(*how_it_ended(exc))
            raise
        self._close("FINISHED", None)

    def keep(self, files: Mapping[str, str | bytes], figures: Mapping[str, float]) -> None:
        """Keep files under `search/`, and figures, instead of those of before. Raises TrackingUnavailable when MLflow
        stays away for minutes."""
        client = self._registry.client

        def send() -> None:
            client.log_artifacts(self._run_id, folder, SEARCH_PATH)
            for name, value in figures.items():
                client.log_metric(self._run_id, name, value)

        with tempfile.TemporaryDirectory(prefix="medloop-") as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content.encode() if isinstance(content, str) else content)
            patiently(self._registry.tracking_uri, send)

    def _close(self, status: str, outcome: str | None) -> None:
        try:
            if not self._busy():
                _terminate(self._registry, self._run_id, status, outcome)
        except MedLoopError as exc:  # a database or an MLflow that is away must not hide why the search ends
            log.warning("the search's run stays open in MLflow: %s", exc)


def mark_dead(registry: Registry, run_id: str) -> None:
    """Close the run of a trial whose process died; where MLflow is away it stays open."""
    try:
        _terminate(registry, run_id, "KILLED", "its process died")
    except MedLoopError as exc:
        log.warning("run %s, whose process died, still counts as running: %s", run_id, exc)


def _terminate(registry: Registry, run_id: str, status: str, outcome: str | None) -> None:
    with translated(registry.tracking_uri, f"Run {run_id}"):
        if outcome is not None:
            registry.client.set_tag(run_id, TAG_OUTCOME, outcome)
        registry.client.set_terminated(run_id, status)
