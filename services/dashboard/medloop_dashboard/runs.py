"""What MLflow knows about a model's versions and their runs, read through the registry's light client."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from medloop.errors import NotFound
from medloop.registry import Registry, translated

if TYPE_CHECKING:
    from mlflow.entities import FileInfo, Run

MAX_VERSIONS = 50
"""Rows of a model's table, newest first: each costs a request."""
MAX_FILES = 500
"""Files listed of one run."""


@dataclass(frozen=True, slots=True)
class VersionRow:
    """A registered version with its run's last metrics; `run_id` is empty when its run is gone."""

    version: str
    aliases: tuple[str, ...]
    run_id: str
    dataset_id: str
    created_at: datetime
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class RunDetail:
    """One run: its last metrics, its parameters, and each metric that has a history as (step, value)."""

    run_id: str
    status: str
    started_at: datetime
    seconds: float | None
    metrics: dict[str, float]
    params: dict[str, str]
    curves: dict[str, list[tuple[int, float]]]


@dataclass(frozen=True, slots=True)
class ArtifactFile:
    """A file of a run; `path` is relative to the run's artifacts, `size` in bytes."""

    path: str
    size: int

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.path).suffix.lower()


def version_rows(registry: Registry, model: str) -> list[VersionRow]:
    """The newest versions of `model`, newest first. Raises NotFound, TrackingUnavailable."""
    from medloop.registry import TAG_DATASET

    rows = []
    for version in registry.versions(model)[:MAX_VERSIONS]:
        run = _run(registry, version.run_id)
        rows.append(
            VersionRow(
                version=version.version,
                aliases=version.aliases,
                run_id=version.run_id if run else "",
                dataset_id=version.tags.get(TAG_DATASET, ""),
                created_at=datetime.fromtimestamp(version.created_at, UTC),
                metrics=dict(run.data.metrics) if run else {},
            )
        )
    return rows


def run_detail(registry: Registry, run_id: str) -> RunDetail:
    """Everything about a run but its files. Raises NotFound, TrackingUnavailable."""
    run = _run(registry, run_id)
    if run is None:
        raise NotFound(f"Run {run_id} is not in MLflow; it was deleted.")
    with translated(registry.tracking_uri, f"Run {run_id}"):
        histories = {name: registry.client.get_metric_history(run_id, name) for name in sorted(run.data.metrics)}
    curves = {
        name: sorted((point.step, point.value) for point in history)
        for name, history in histories.items()
        if len({point.step for point in history}) > 1
    }
    end = run.info.end_time
    return RunDetail(
        run_id=run_id,
        status=str(run.info.status),
        started_at=datetime.fromtimestamp(run.info.start_time / 1000, UTC),
        seconds=(end - run.info.start_time) / 1000 if end else None,
        metrics=dict(run.data.metrics),
        params=dict(run.data.params),
        curves=curves,
    )


def artifact_files(registry: Registry, run_id: str) -> list[ArtifactFile]:
    """All files of a run by path, at most `MAX_FILES` of them."""
    files: list[ArtifactFile] = []
    folders: list[str | None] = [None]
    with translated(registry.tracking_uri, f"Run {run_id}"):
        while folders and len(files) < MAX_FILES:
            found: list[FileInfo] = registry.client.list_artifacts(run_id, folders.pop())
            folders += [entry.path for entry in found if entry.is_dir]
            files += [ArtifactFile(entry.path, int(entry.file_size or 0)) for entry in found if not entry.is_dir]
    return sorted(files[:MAX_FILES], key=lambda file: file.path)


def tree(files: Sequence[ArtifactFile]) -> list[tuple[int, str, int]]:
    """(depth, name, bytes) of every file and folder, each folder before what it holds; `files` in order of path."""
    sizes: dict[str, int] = {}
    for file in files:
        parts = file.path.split("/")
        for end in range(1, len(parts) + 1):
            path = "/".join(parts[:end]) + ("/" if end < len(parts) else "")
            sizes[path] = sizes.get(path, 0) + file.size
    names = {path: path.rstrip("/").rpartition("/")[2] + ("/" if path.endswith("/") else "") for path in sizes}
    return [(path.rstrip("/").count("/"), names[path], size) for path, size in sizes.items()]


def read_artifact(registry: Registry, run_id: str, path: str) -> bytes:
    """The bytes of one file of a run. Raises NotFound, TrackingUnavailable."""
    with tempfile.TemporaryDirectory(prefix="medloop-") as folder, translated(registry.tracking_uri, f"{path}"):
        return Path(registry.client.download_artifacts(run_id, path, folder)).read_bytes()


def _run(registry: Registry, run_id: str) -> "Run | None":
    try:
        with translated(registry.tracking_uri, f"Run {run_id}"):
            return registry.client.get_run(run_id)
    except NotFound:
        return None
