"""Reproduction: what a run logged is enough to train again, and what comes out is held against what it came to.

Nothing is registered and no alias moves. A reproduction that is stopped begins anew: it keeps no checkpoints, which
`--resume` would make a version of.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medloop.bundle import WEIGHTS
from medloop.errors import InvalidRequest, NotFound, UntrustedModel
from medloop.registry import Registry
from medloop.storage.objects import open_objects
from pydantic import BaseModel

from medloop_trainer.curves import curves_png, epoch_metrics
from medloop_trainer.dataset import Material, gather
from medloop_trainer.environment import environment_tags
from medloop_trainer.original import CURVES, TAG_REPRODUCES, Difference, Original, differences, read_original
from medloop_trainer.progress import Bars
from medloop_trainer.publish import figures_of
from medloop_trainer.retrain import Origin, find_parent
from medloop_trainer.settings import LoopSettings, TrainerSettings
from medloop_trainer.state import Epoch
from medloop_trainer.stop import Stop
from medloop_trainer.track import Run
from medloop_trainer.train import how_it_ended

if TYPE_CHECKING:
    from medloop.nets import ServedNetwork

    from medloop_trainer.learn import Surroundings

log = logging.getLogger(__name__)

_FROM_FILE = "file:"  # as `medloop.nets` names weights that did not come from its hub
_JUDGED = ("best_val_loss", "best_val_accuracy")
_FIGURES = (*_JUDGED, "best_epoch", "temperature")


class Figure(BaseModel):
    then: float
    now: float

    @property
    def difference(self) -> float:
        return abs(self.now - self.then)


class Curve(BaseModel):
    """One metric over the epochs that both runs have: the largest |Δ|, and the epoch it lies in."""

    max_difference: float
    epoch: int


class Comparison(BaseModel):
    """`weights` are the SHA-256 of weights.safetensors. `max_difference` is the largest |Δ| of any validation figure,
    of the best epochs and of any epoch that both runs have; equal runs have 0."""

    weights_then: str
    weights_now: str
    weights_equal: bool
    max_difference: float
    epochs: Figure
    figures: dict[str, Figure]
    curves: dict[str, Curve]


class Reproduction(Comparison):
    """What a reproduction says on its last line. `differs` is what is not as it was, and may be why."""

    run_id: str
    reproduces: str
    model: str
    dataset_id: str
    differs: list[Difference]

    @property
    def sentence(self) -> str:
        if self.weights_equal:
            return f"reproduces run {self.reproduces} to the bit"
        return f"reproduces run {self.reproduces}, but validation figures differ by up to {self.max_difference:.2g}"


def reproduce(
    settings: TrainerSettings, run_id: str, bars: Bars, stop: Stop | None = None, pretrained: Path | None = None
) -> Reproduction:
    """Train again as run `run_id` did, in a new run, and say how far that is from what it came to.

    `pretrained` is the file of weights that the run began with, if it began with one.

    Raises:
        NotFound: no such run, or its data set version or the parent of a retraining is gone.
        InvalidRequest: the run made no version, is a reproduction itself, or began with weights that are not here.
        UntrustedModel: the parent's bundle is another one by now.
        TrackingUnavailable, StorageUnavailable, StorageFull, InvalidDataset, TrainingFailed, Preempted: as `train`.
    """
    registry = Registry(settings.tracking.tracking_uri)
    original = read_original(registry, run_id)
    origin = _origin(registry, original, settings.home.bundles_dir)
    card, home = original.card, settings.home
    objects = open_objects(settings.storage.objects_url)
    material = gather(objects, card.dataset_id, card.model, lambda _: card.preparation, home.cache_dir, bars)
    network = _first_network(original, material, origin, pretrained)
    run = Run.start(registry, card.model, card.dataset_id, home=home.home, tags={TAG_REPRODUCES: run_id})
    try:
        from medloop_trainer.learn import Surroundings

        run.log_dataset(material.manifest, settings.storage.objects_url)
        found = _train_again(original, material, network, Surroundings(None, run, bars, stop or Stop()))
    except BaseException as exc:
        run.abandon(*how_it_ended(exc))
        raise
    run.finish(found.sentence)
    return found


def _origin(registry: Registry, original: Original, folder: Path) -> Origin | None:
    parent = original.recipe.parent
    if parent is None:
        return None
    try:
        return find_parent(registry, parent, folder)
    except (NotFound, UntrustedModel) as exc:
        raise type(exc)(
            f"Run {original.run_id} went on from {parent.model} version {parent.version}, which cannot be had as it "
            f"was then: {exc.detail}"
        ) from exc


def _first_network(
    original: Original, material: Material, origin: Origin | None, pretrained: Path | None
) -> "ServedNetwork":
    from medloop_trainer.learn import set_up_again

    recipe = original.recipe
    if recipe.pretrained is not None and recipe.pretrained.startswith(_FROM_FILE) and pretrained is None:
        name = recipe.pretrained.removeprefix(_FROM_FILE)
        raise InvalidRequest(f"Run {original.run_id} began with the weights in {name}; name that file: --pretrained.")
    return set_up_again(material, recipe, origin, pretrained)


def _train_again(
    original: Original, material: Material, network: "ServedNetwork", around: "Surroundings"
) -> Reproduction:
    from medloop.nets.export import pack_weights

    from medloop_trainer.device import choose_device
    from medloop_trainer.learn import describe, params_of, train_on

    run, device = around.run, choose_device()
    about = describe(run.id, material, network, original.recipe, _loop_settings(original), device)
    params = params_of(about, material, device)
    run.log_params(params)
    differs = differences(original, params, about.packages, environment_tags())
    for difference in differs:
        log.warning("%s was %s and is %s", difference.what, difference.then, difference.now)
    trained = train_on(network, about, None, material, device, around)
    figures = figures_of(trained)
    digest = hashlib.sha256(pack_weights(trained.network)).hexdigest()
    found = Reproduction(
        **dict(compare(original, trained.fit.epochs, figures, digest)),
        run_id=run.id,
        reproduces=original.run_id,
        model=about.model,
        dataset_id=about.dataset_id,
        differs=differs,
    )
    log.info("run %s %s", run.id, found.sentence)  # said before MLflow is waited for
    run.log_files(
        {
            "recipe.json": about.recipe.model_dump_json(indent=1),
            "curves.png": curves_png(trained.fit.epochs),
            "reproduction.json": found.model_dump_json(indent=1),
        }
    )
    run.log_figures(figures | {"reproduction_max_difference": found.max_difference})
    return found


def _loop_settings(original: Original) -> LoopSettings:
    """Those the run had; what it did not log is today's."""
    logged = {"compile": original.params.get("compiled"), "checkpoint_steps": original.params.get("checkpoint_steps")}
    return LoopSettings.model_validate({name: value for name, value in logged.items() if value is not None})


def compare(original: Original, epochs: Sequence[Epoch], figures: Mapping[str, float], weights: str) -> Comparison:
    """Hold what training again came to (`weights` is the SHA-256 of its weights.safetensors) against the original."""
    now = {epoch.number: epoch_metrics(epoch) for epoch in epochs}
    curves = {name: found for name in CURVES if (found := _curve(original.curves[name], name, now)) is not None}
    pairs = {
        name: Figure(then=original.figures[name], now=figures[name]) for name in _FIGURES if name in original.figures
    }
    distances = [curve.max_difference for curve in curves.values()]
    distances += [pairs[name].difference for name in _JUDGED if name in pairs]
    then = original.card.files.get(WEIGHTS, "")
    return Comparison(
        weights_then=then,
        weights_now=weights,
        weights_equal=then == weights,
        max_difference=max(distances, default=0.0),
        epochs=Figure(then=len(original.curves[CURVES[0]]), now=len(epochs)),
        figures=pairs,
        curves=curves,
    )


def _curve(then: Mapping[int, float], name: str, now: Mapping[int, Mapping[str, float]]) -> Curve | None:
    found = {epoch: abs(now[epoch][name] - then[epoch]) for epoch in then if name in now.get(epoch, {})}
    if not found:  # an AUC that is not defined
        return None
    worst = max(found, key=lambda epoch: found[epoch])
    return Curve(max_difference=found[worst], epoch=worst)
