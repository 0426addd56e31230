"""Retraining: a new data set version, learnt from the champion's weights on.

The version holds the lineage's old images too, and all that train are shown, so that nothing is forgotten; those that a
person corrected are shown more often. What comes out is a challenger like any other.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from medloop.bundle import Bundle
from medloop.data.leaks import leaked_rows, rows_alike
from medloop.data.manifest import SPLITS, Manifest, load_manifest
from medloop.errors import InvalidDataset, InvalidRequest, NotFound
from medloop.registry import CHAMPION, TAG_DATASET, TAG_DIGEST, Registry, Version, fetch_bundle, translated
from medloop.storage.objects import ObjectStore
from medloop.vision.prepare import PreparationSpec
from numpy.typing import NDArray

from medloop_trainer.progress import Bars
from medloop_trainer.publish import TrainingResult
from medloop_trainer.recipe import Options, ParentVersion
from medloop_trainer.settings import TrainerSettings
from medloop_trainer.stop import Stop
from medloop_trainer.train import train

if TYPE_CHECKING:
    from medloop.nets import ServedNetwork

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Origin:
    """The version that a retraining goes on from. The hashes of `bundle` are what they were when it was registered."""

    parent: ParentVersion
    bundle: Bundle

    @property
    def name(self) -> str:
        return f"{self.parent.model} version {self.parent.version}"

    def preparation(self, manifest: Manifest, objects: ObjectStore, folder: Path | None = None) -> PreparationSpec:
        """How the images of `manifest` are prepared: as the parent has them, and will have them in its child. In
        `folder` lie the rows of the version that the parent learnt from, as in `load_manifest`.

        Raises InvalidDataset when the parent cannot go on with that version: it has other classes, the parent learnt
        from another lineage, or from images that judge in this version.
        """
        card = self.bundle.card
        if manifest.classes != card.classes:
            raise InvalidDataset(
                f"The data set has the classes {', '.join(manifest.classes)}, and {self.name} has "
                f"{', '.join(card.classes)}: it cannot go on with others. Train anew."
            )
        if manifest.id == card.dataset_id:
            log.warning("%s has learnt from this very version: there is nothing new in it", self.name)
            return card.preparation
        try:
            known = load_manifest(objects, card.dataset_id, name=manifest.name, folder=folder)
        except NotFound as exc:
            raise InvalidDataset(
                f"{self.name} learnt from data set {card.dataset_id[:16]}, which is no version of {manifest.name} in "
                f"{objects.url}, so nobody knows which images it has seen. Train anew."
            ) from exc
        judging = np.flatnonzero(manifest.columns.splits != SPLITS.index("train"))
        seen = {manifest.rows[i].pixel_hash for i in rows_alike(manifest, judging, known, learnt_from(known)).tolist()}
        if seen:
            raise InvalidDataset(
                f"{len(seen)} images that {self.name} learnt from stand in a split of this version that judges; it "
                "would know the answers. Train anew."
            )
        return card.preparation

    def network(self) -> "ServedNetwork":
        """The parent's network, head and normalisation included. Raises UntrustedModel for weights that do not make
        it, and InvalidRequest for an architecture that this trainer does not have."""
        from medloop.nets import rebuild

        try:
            return rebuild(self.bundle)
        except InvalidRequest as exc:
            raise InvalidRequest(
                f"{self.name} is a {self.bundle.card.architecture}, an architecture that this trainer does not know; "
                "train anew, or retrain with a trainer that does."
            ) from exc


def retrain(
    settings: TrainerSettings, dataset_id: str, model: str, options: Options, bars: Bars, stop: Stop | None = None
) -> TrainingResult:
    """Train the champion of `model` on a stored data set version, and register what comes out as a challenger.

    Raises as `train` does; NotFound also when there is no champion, InvalidDataset when it cannot go on with that
    version, and UntrustedModel when its bundle is not the one that was registered.
    """
    champion = find_champion(Registry(settings.tracking.tracking_uri), model, settings.home.bundles_dir)
    return train(settings, dataset_id, model, options, bars, stop, champion)


def learnt_already(settings: TrainerSettings, model: str, dataset_id: str) -> str | None:
    """The newest version of `model` that learnt from this data set version, whatever became of it since; None when none
    did. One whose training was lost before it ended does not count: perhaps nobody was told of it. Raises NotFound when
    there is no such model, and TrackingUnavailable."""
    registry = Registry(settings.tracking.tracking_uri)
    alike = (found for found in registry.versions(model) if found.tags.get(TAG_DATASET) == dataset_id)
    with translated(registry.tracking_uri, f"The runs of {model}"):
        ended = (one for one in alike if registry.client.get_run(one.run_id).info.status == "FINISHED")
        return next((one.version for one in ended), None)


def find_champion(registry: Registry, model: str, folder: Path) -> Origin:
    """The champion, its bundle kept under `folder`.

    Raises NotFound when there is none, UntrustedModel when its bundle is not the one that was registered,
    and TrackingUnavailable.
    """
    found = registry.at_alias(model, CHAMPION)
    if found is None:
        raise NotFound(f"Model {model} has no champion to go on from; train first, and approve what comes out.")
    return _fetched(registry, found, folder)


def find_parent(registry: Registry, parent: ParentVersion, folder: Path) -> Origin:
    """Where a retraining in the past began. Raises as `find_champion` does, and UntrustedModel when the version holds
    another bundle by now."""
    found = registry.version(parent.model, parent.version)
    tags = {TAG_DIGEST: parent.bundle_digest}
    return _fetched(registry, Version(parent.model, parent.version, found.run_id, tags), folder)


def _fetched(registry: Registry, version: Version, folder: Path) -> Origin:
    bundle = fetch_bundle(registry, version, folder)
    parent = ParentVersion(
        model=version.model, version=version.version, run_id=version.run_id, bundle_digest=bundle.digest
    )
    return Origin(parent, bundle)


def learnt_from(manifest: Manifest) -> NDArray[np.int64]:
    """The rows that a training on `manifest` learns from."""
    return np.setdiff1d(manifest.columns.rows_of("train"), leaked_rows(manifest, "train"))
