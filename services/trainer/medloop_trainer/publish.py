"""From a trained network to a registered version, in two steps of which the first leaves all that the second needs.

`MEDLOOP_HOME/training/<run id>/` then has `bundle/`, `files/` (what MLflow shows beside it) and, written last,
`finished.json`. With these a run can be registered although objects, the data set and torch are out of reach.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from medloop.bundle import Bundle, Card, read_bundle
from medloop.errors import NotFound, UntrustedModel
from medloop.registry import CHALLENGER, TAG_DATASET, TAG_DIGEST, Registry, Version
from medloop.schemas import now
from pydantic import BaseModel, ConfigDict, ValidationError

from medloop_trainer.dataset import Material, hashes
from medloop_trainer.recipe import TAG_PARENT_VERSION, ParentVersion
from medloop_trainer.track import Run, curves_png, git_commit, patiently

if TYPE_CHECKING:
    from medloop_trainer.learn import Trained

log = logging.getLogger(__name__)

_BUNDLE, _FILES, _FINISHED = "bundle", "files", "finished.json"


class ValidationFigures(BaseModel):
    accuracy: float
    loss: float


class TrainingResult(BaseModel):
    """What the trainer says on its last line. `seconds` has cache, train, export and register, as far as this process
    did them."""

    model: str
    version: str
    run_id: str
    dataset_id: str
    bundle_digest: str
    seconds: dict[str, float]
    images_per_second: float
    epochs: int
    best_epoch: int
    val: ValidationFigures
    parent: ParentVersion | None = None


class Finished(BaseModel):
    """What a training came to; `figures` are those of the whole run in MLflow."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    run_id: str
    dataset_id: str
    bundle_digest: str
    images_per_second: float
    epochs: int
    best_epoch: int
    val: ValidationFigures
    figures: dict[str, float]
    parent: ParentVersion | None = None

    def as_version(self, version: Version, seconds: dict[str, float]) -> TrainingResult:
        # The version's own digest: its bundle was perhaps exported by a process before this one.
        known = self.model_dump(exclude={"figures", "bundle_digest"})
        digest = version.tags[TAG_DIGEST]
        return TrainingResult(**known, version=version.version, bundle_digest=digest, seconds=seconds)


def export(folder: Path, material: Material, trained: "Trained") -> Finished:
    """Write the bundle and what belongs to it into `folder`, in place of what may be there."""
    from medloop.nets import TrainingImages, export_bundle
    from medloop.nets.export import REFERENCE_IMAGES

    empty(folder)
    cache, rows = material.cache, material.rows
    learnt, others = (some[:: max(1, -(-len(some) // REFERENCE_IMAGES))] for some in (rows.train, rows.calibration))
    training = TrainingImages(
        cache.images[learnt], cache.labels[learnt], hashes(material.manifest, learnt), cache.images[others]
    )
    check = cache.images[rows.val[:256]]
    bundle = export_bundle(folder / _BUNDLE, trained.network, _card(trained, material), training, check)
    (folder / _FILES).mkdir()
    for name, content in _files(material, trained).items():
        (folder / _FILES / name).write_bytes(content.encode() if isinstance(content, str) else content)
    finished = _finished(bundle, trained)
    incoming = folder / f".{_FINISHED}"
    incoming.write_text(finished.model_dump_json(indent=1) + "\n")
    os.sync()  # what was computed for hours is to outlive a power failure, too
    incoming.rename(folder / _FINISHED)
    return finished


def empty(folder: Path) -> None:
    """Remove what `export` left in `folder`, and what it did not come to the end of."""
    (folder / _FINISHED).unlink(missing_ok=True)  # first: it stands for the rest
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def read_finished(folder: Path) -> Finished | None:
    """What `export` left in `folder`, if it is there and whole."""
    try:
        finished = Finished.model_validate_json((folder / _FINISHED).read_bytes())
        whole = read_bundle(folder / _BUNDLE).digest == finished.bundle_digest
    except FileNotFoundError:
        return None
    except (ValidationError, UntrustedModel) as exc:
        log.warning("the bundle kept in %s is damaged, and is made again: %s", folder, exc)
        return None
    return finished if whole else None


def register(registry: Registry, run: Run, folder: Path, finished: Finished) -> Version:
    """Log and register what `export` left in `folder`, and let `challenger` point at it; each once, however often this
    is called. Raises TrackingUnavailable when MLflow stays away for minutes."""
    model, uri = finished.model, registry.tracking_uri
    if patiently(uri, lambda: _registered(registry, model, run.id)) is None:
        run.log_bundle(folder / _BUNDLE)
        run.log_files({path.name: path.read_bytes() for path in sorted((folder / _FILES).iterdir())})
        run.log_figures(finished.figures)
    tags = {TAG_DIGEST: finished.bundle_digest, TAG_DATASET: finished.dataset_id}
    if finished.parent is not None:
        tags[TAG_PARENT_VERSION] = finished.parent.version
    version = patiently(uri, lambda: _registered(registry, model, run.id) or registry.register(model, run.id, tags))
    patiently(uri, lambda: _challenge(registry, version))
    return version


def _registered(registry: Registry, model: str, run_id: str) -> Version | None:
    try:
        return next((version for version in registry.versions(model) if version.run_id == run_id), None)
    except NotFound:  # the model's first
        return None


def _challenge(registry: Registry, version: Version) -> None:
    present = registry.at_alias(version.model, CHALLENGER)
    if present is None or int(present.version) < int(version.version):
        registry.set_alias(version.model, CHALLENGER, version.version)


def _card(trained: "Trained", material: Material) -> Card:
    about, calibration = trained.about, trained.calibration
    return Card(
        model=material.manifest.name,
        classes=material.manifest.classes,
        preparation=material.spec,
        architecture=about.architecture.id,
        temperature=calibration.temperature,
        conformal=calibration.conformal,
        operating_thresholds=calibration.operating_thresholds,
        dataset_id=material.manifest.id,
        run_id=about.run_id,
        git_commit=git_commit(),
        seed=about.recipe.seed,
        packages=about.packages,
        created_at=now(),
    )


def _files(material: Material, trained: "Trained") -> dict[str, str | bytes]:
    files: dict[str, str | bytes] = {
        "class_distribution.json": json.dumps(material.manifest.counts(), indent=1),
        "recipe.json": trained.about.recipe.model_dump_json(indent=1),
        "curves.png": curves_png(trained.fit.epochs),
    }
    return files if material.leaks is None else {**files, "leaks.json": material.leaks.to_json()}


def figures_of(trained: "Trained") -> dict[str, float]:
    """The figures of a whole run in MLflow."""
    fit = trained.fit
    return {
        "best_epoch": fit.best.number,
        "best_val_loss": fit.best.val.loss,
        "best_val_accuracy": fit.best.val.accuracy,
        "training_images_per_second": fit.images_per_second,
        "temperature": trained.calibration.temperature,
    }


def _finished(bundle: Bundle, trained: "Trained") -> Finished:
    fit, best, about = trained.fit, trained.fit.best, trained.about
    return Finished(
        model=about.model,
        run_id=about.run_id,
        dataset_id=about.dataset_id,
        bundle_digest=bundle.digest,
        images_per_second=round(fit.images_per_second, 1),
        epochs=len(fit.epochs),
        best_epoch=best.number,
        val=ValidationFigures(accuracy=best.val.accuracy, loss=best.val.loss),
        figures=figures_of(trained),
        parent=about.recipe.parent,
    )
