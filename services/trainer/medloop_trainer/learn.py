"""From prepared images to a trained, calibrated network: begun, or gone on with from a checkpoint."""

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from medloop.errors import InvalidRequest
from medloop.nets import Architecture, ServedNetwork, build
from medloop.storage.objects import ObjectStore
from numpy.typing import NDArray

from medloop_trainer.budget import measure, most_steps
from medloop_trainer.calibrate import Calibration, calibrate
from medloop_trainer.checkpoint import About, Checkpoints, Found
from medloop_trainer.dataset import Material, normalisation
from medloop_trainer.device import Device, choose_device
from medloop_trainer.loop import Epoch, Fit, Images, fit, logits_of
from medloop_trainer.modality import look
from medloop_trainer.progress import Bars
from medloop_trainer.randomness import seed_weights
from medloop_trainer.ranks import Ranks
from medloop_trainer.recipe import Options, Recipe, choose_correction_weight
from medloop_trainer.saver import Saver
from medloop_trainer.settings import LoopSettings
from medloop_trainer.stop import Stop
from medloop_trainer.task import Task, summon
from medloop_trainer.track import Run, package_versions

if TYPE_CHECKING:
    from medloop_trainer.retrain import Origin

log = logging.getLogger(__name__)

_SAMPLE = 2000  # training images that decide which changes are harmless


@dataclass(frozen=True, slots=True)
class Trained:
    network: ServedNetwork
    about: About
    fit: Fit
    calibration: Calibration


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Who is told, and where checkpoints go; None for nowhere."""

    objects: ObjectStore | None
    run: Run
    bars: Bars
    stop: Stop


def begin(
    material: Material, options: Options, settings: LoopSettings, around: Surroundings, origin: "Origin | None" = None
) -> Trained:
    """Settle the recipe, and train and calibrate a network: a new one, or that of `origin`.

    Raises InvalidRequest for options that do not fit together, and what `fit` does.
    """
    device = choose_device()
    network, recipe = set_up(material, options, device, origin=origin, compiled=settings.compile)
    about = describe(around.run.id, material, network, recipe, settings, device)
    around.run.log_params(params_of(about, material, device))
    return train_on(network, about, None, material, device, around)


def describe(
    run_id: str, material: Material, network: ServedNetwork, recipe: Recipe, settings: LoopSettings, device: Device
) -> About:
    """What is trained, on what and how, as its checkpoints say it."""
    return About(
        run_id=run_id,
        model=material.manifest.name,
        dataset_id=material.manifest.id,
        preparation=material.spec,
        architecture=network.architecture,
        recipe=recipe,
        checkpoint_steps=settings.checkpoint_steps,
        compiled=settings.compile,
        device=device.name,
        threads=device.threads,
        packages=package_versions(),
    )


def set_up(
    material: Material, options: Options, device: Device, *, origin: "Origin | None" = None, compiled: bool = False
) -> tuple[ServedNetwork, Recipe]:
    """A network that has learnt nothing of `material` yet, or that of `origin`, and the recipe for it. Raises
    InvalidRequest for options that do not fit together."""
    architecture = options.choose_architecture(material.spec.size)
    network = origin.network() if origin else _network(material, architecture, options.seed, options.weights)
    return network, _settle(options, material, network, device, origin, compiled=compiled)


def set_up_again(
    material: Material, recipe: Recipe, origin: "Origin | None" = None, pretrained: Path | None = None
) -> ServedNetwork:
    """The network that a run of `recipe` began with. `pretrained` is where its weights lie, if a file held them. Raises
    InvalidRequest when they are not to be had."""
    if origin is not None:
        return origin.network()
    weights = None if recipe.pretrained is None else pretrained or "auto"
    network = _network(material, recipe.architecture, recipe.seed, weights)
    if network.classifier.pretrained != recipe.pretrained:
        raise InvalidRequest(
            f"The run began with the weights {recipe.pretrained}, which are not to be had here; name the file that "
            "holds them with --pretrained, or reproduce it where they can be fetched."
        )
    return network


def _network(material: Material, architecture: str, seed: int, weights: str | Path | None) -> ServedNetwork:
    seed_weights(seed)
    wanted = Architecture(
        id=architecture,
        classes=len(material.manifest.classes),
        channels=material.spec.channels,
        size=material.spec.size,
    )
    classifier = build(wanted, weights)
    return ServedNetwork(wanted, classifier, *_normalisation(material, classifier.pretrained))


def go_on(material: Material, found: Found, around: Surroundings) -> Trained:
    """Train from a checkpoint to the end, and calibrate. Raises what `fit` does."""
    device, about = choose_device(), found.about
    here = (device.name, device.threads, package_versions())
    if here != (about.device, about.threads, about.packages):
        log.warning(
            "the run began on another device, with another number of threads or other packages; its weights may differ "
            "in their last bits from those of a run that was not stopped"
        )
    unset = [0.0]  # normalisation is among the network's tensors
    network = ServedNetwork(about.architecture, build(about.architecture), unset, unset)
    log.info("going on after step %d of %d", found.last.state.step, about.recipe.steps)
    return train_on(network, about, found, material, device, around)


def train_on(
    network: ServedNetwork,
    about: About,
    found: Found | None,
    material: Material,
    device: Device,
    around: Surroundings,
) -> Trained:
    """Train and calibrate `network`, from the checkpoint `found` if there is one. Raises what `fit` does."""
    cache, epochs = material.cache, about.recipe.epochs

    def report(epoch: Epoch) -> None:
        around.run.log_epoch(epoch)
        around.bars.note("training", f"epoch {epoch.number}/{epochs}, val {epoch.val.accuracy:.4f}")
        log.info("epoch", extra={"epoch": epoch.number, "val_loss": epoch.val.loss, "accuracy": epoch.val.accuracy})

    checkpoints = None if around.objects is None else Checkpoints(around.objects, about)
    if found is not None and checkpoints is not None:
        checkpoints.adopt([found.mark, found.last])
        for epoch in found.last.state.epochs:
            around.run.log_epoch(epoch)  # those that MLflow had not received when the run was killed
    with nullcontext() if checkpoints is None else Saver(checkpoints) as saver:
        fitted = fit(
            network,
            images_of(material, about.recipe.correction_weight),
            about.recipe,
            device,
            ranks=summon(
                Task.of("train", material, network, about.recipe, compiled=about.compiled, steps=about.checkpoint_steps)
            ),
            start=None if found is None else (found.last, found.mark),
            saver=saver,
            stop=around.stop,
            checkpoint_steps=about.checkpoint_steps,
            compiled=about.compiled,
            report=report,
            progress=around.bars,
        )
    rows = material.rows.calibration
    logits = logits_of(network, cache.images, device, rows=rows)
    calibration = calibrate(logits, cache.labels[rows], material.manifest.classes)
    network.temperature.fill_(calibration.temperature)
    return Trained(network, about, fitted, calibration)


def _settle(
    options: Options,
    material: Material,
    network: ServedNetwork,
    device: Device,
    origin: "Origin | None",
    *,
    compiled: bool,
) -> Recipe:
    cache, rows = material.cache, material.rows.train
    parent = None if origin is None else origin.parent
    images = images_of(material, choose_correction_weight(options, parent))
    sample = rows[:: -(-len(rows) // _SAMPLE)]
    looks = look(cache.images[sample], cache.labels[sample])

    def settle(most: int | None) -> Recipe:
        return Recipe.settle(
            options,
            architecture=network.architecture.id,
            size=material.spec.size,
            images=len(images.train),
            pretrained=network.classifier.pretrained,
            parent=parent,
            looks=looks,
            most_steps=most,
        )

    recipe = settle(None)
    if options.budget_minutes is None:
        return recipe
    ranks = summon(Task.of("measure", material, network, recipe, compiled=compiled))
    pace = measure(network, images, recipe, device, compiled=compiled, ranks=ranks)
    recipe = settle(most_steps(options.budget_minutes, pace, recipe.steps_per_epoch))
    log.info("a step takes %.3f s: %d steps in %d epochs fit the budget", pace.step, recipe.steps, recipe.epochs)
    return recipe


def images_of(material: Material, correction_weight: int = 1) -> Images:
    """What `fit` takes. A training image that a person corrected stands there `correction_weight` times, so that every
    pass shows it so much more often, and the classes' shares follow."""
    rows = material.rows.train
    corrected = _corrected(material)
    shown = np.repeat(rows, np.where(corrected, correction_weight, 1)) if corrected.any() else rows
    cache = material.cache
    return Images(cache.images, cache.labels, shown, material.rows.val, cache.shards)


def _corrected(material: Material) -> NDArray[np.bool_]:
    return material.manifest.columns.corrected[material.rows.train]


def _normalisation(material: Material, pretrained: str | None) -> tuple[list[float], list[float]]:
    if pretrained is not None:
        return [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's, which those weights were trained with
    return normalisation(material.cache, material.rows.train)


def params_of(about: About, material: Material, device: Device) -> dict[str, object]:
    """What a run logs as its parameters."""
    splits = {f"images_{split}": sum(counts.values()) for split, counts in material.manifest.counts().items()}
    return {
        **about.recipe.model_dump(exclude={"schema_version", "parent"}),
        **splits,
        "dataset_id": material.manifest.id,
        "classes": len(material.manifest.classes),
        "images_trained_on": len(material.rows.train),
        "images_left_out_as_leaks": material.rows.left_out,
        "images_corrected": int(_corrected(material).sum()),
        "device": device.name,
        "precision": str(device.autocast).removeprefix("torch."),
        "threads": device.threads,
        "processes": Ranks.present().world,
        "compiled": about.compiled,
        "checkpoint_steps": about.checkpoint_steps,
    }
