"""The trainer's story: objects → manifest → cache → network → bundle → MLflow → registry → `challenger`."""

import json
import logging
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from medloop.bundle import CARD, Bundle, Card
from medloop.data.cache import Cache, open_cache
from medloop.data.leaks import load_leaks
from medloop.data.manifest import Manifest, load_manifest
from medloop.errors import InvalidRequest, MedLoopError, NotFound
from medloop.registry import CHALLENGER, TAG_DATASET, TAG_DIGEST, Registry, Version
from medloop.schemas import Name, now
from medloop.settings import HomeSettings, StorageSettings, TrackingSettings
from medloop.storage.disk import disk_errors
from medloop.storage.objects import ObjectStore, open_objects
from medloop.vision.prepare import PreparationSpec
from pydantic import BaseModel, TypeAdapter, ValidationError

from medloop_trainer.dataset import CleanRows, clean_rows, hashes, look_at, normalisation
from medloop_trainer.progress import Bars
from medloop_trainer.recipe import Options, Recipe
from medloop_trainer.track import Run, curves_png, git_commit, package_versions, patiently

if TYPE_CHECKING:
    from medloop.nets import ServedNetwork

    from medloop_trainer.calibrate import Calibration
    from medloop_trainer.device import Device
    from medloop_trainer.loop import Epoch, Fit

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainerSettings:
    """What the trainer reads from its environment: the shared groups, composed."""

    home: HomeSettings = field(default_factory=HomeSettings)
    storage: StorageSettings = field(default_factory=StorageSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)


class ValidationFigures(BaseModel):
    accuracy: float
    loss: float


class TrainingResult(BaseModel):
    """What the trainer says on its last line. `seconds` has cache, train, export and register."""

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


@dataclass(frozen=True, slots=True)
class Material:
    """What is trained on: the version, its prepared pixels, and the rows that may be learnt from."""

    manifest: Manifest
    spec: PreparationSpec
    cache: Cache
    rows: CleanRows


@dataclass(frozen=True, slots=True)
class Trained:
    network: "ServedNetwork"
    recipe: Recipe
    fit: "Fit"
    calibration: "Calibration"


class Clock:
    """Seconds by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(time.perf_counter() - started, 3)


def train(settings: TrainerSettings, dataset_id: str, model: str, options: Options, bars: Bars) -> TrainingResult:
    """Train a network on a stored data set version and register it as the next version of `model`, which is the name
    of the version's lineage; its alias `challenger` then points at it.

    Raises:
        TrackingUnavailable: MLflow does not answer; asked first, before anything is computed.
        NotFound: no such data set version in that lineage.
        InvalidDataset, InvalidRequest: nothing can be learnt from it, or not with these options.
        StorageFull, StorageUnavailable: objects or the home folder cannot be used.
        TrainingFailed: the loss was no number, or the exported network is not the trained one.
    """
    _check_name(model)
    objects = open_objects(settings.storage.objects_url)
    registry, clock = Registry(settings.tracking.tracking_uri), Clock()
    registry.ping()
    # Importing torch takes seconds, which the decoding of images fills.
    with ThreadPoolExecutor(1) as background, clock.step("cache"):
        torch_ready = background.submit(_import_torch)
        material = _gather(settings, objects, dataset_id, model, options, bars)
        torch_ready.result()
    with _run(registry, model, dataset_id) as run, _workplace(settings.home.home / "training" / run.id) as folder:
        with clock.step("train"):
            trained = _learn(material, options, run, bars)
        with clock.step("export"), bars.waiting("exporting"):
            bundle = _export(folder, material, trained, run)
        with clock.step("register"), bars.waiting("registering"):
            version = _register(registry, run, bundle, material, trained, objects, model)
    return _result(version, bundle, trained, clock)


def _check_name(model: str) -> None:
    try:
        TypeAdapter(Name).validate_python(model)
    except ValidationError as exc:
        raise InvalidRequest(f"{model!r} cannot name a model; name the data set's lineage.") from exc


def _import_torch() -> None:
    import medloop.nets  # noqa: F401
    import torchvision.transforms.v2  # noqa: F401


def _gather(
    settings: TrainerSettings, objects: ObjectStore, dataset_id: str, model: str, options: Options, bars: Bars
) -> Material:
    manifest = load_manifest(objects, dataset_id, name=model)
    rows = clean_rows(manifest)
    spec = look_at(manifest, objects).spec(options)
    cache = open_cache(manifest, spec, objects, settings.home.cache_dir, bars)
    return Material(manifest, spec, cache, rows)


@contextmanager
def _run(registry: Registry, model: str, dataset_id: str) -> Iterator[Run]:
    """A run that ends as it should, whatever happens inside."""
    run = Run.start(registry, model, dataset_id)
    try:
        yield run
    except MedLoopError as exc:
        run.abandon("FAILED", f"{exc.code}: {exc.detail}")
        raise
    except Exception:
        run.abandon("FAILED", "internal: see the trainer's log")
        raise
    except BaseException:  # Ctrl-C, or SIGTERM by way of SystemExit
        run.abandon("KILLED", "stopped")
        raise
    run.finish()


@contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """An empty folder for the bundle. It goes in the end, unless it holds a bundle that could not be registered."""
    with disk_errors(folder):
        folder.mkdir(parents=True)
        try:
            yield folder
        except BaseException:
            if (folder / CARD).exists():
                log.warning("the trained bundle was not registered; it is kept in %s", folder)
            else:
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


def _learn(material: Material, options: Options, run: Run, bars: Bars) -> Trained:
    import torch
    from medloop.nets import Architecture, ServedNetwork, build

    from medloop_trainer.calibrate import calibrate
    from medloop_trainer.device import choose_device
    from medloop_trainer.loop import Images, fit, logits_of

    torch.manual_seed(options.seed)
    device, cache, spec = choose_device(), material.cache, material.spec
    architecture = Architecture(
        id=options.choose_architecture(spec.size),
        classes=len(material.manifest.classes),
        channels=spec.channels,
        size=spec.size,
    )
    classifier = build(architecture, options.weights)
    recipe = Recipe.settle(
        options,
        architecture=architecture.id,
        size=spec.size,
        images=len(material.rows.train),
        pretrained=classifier.pretrained,
    )
    network = ServedNetwork(architecture, classifier, *_normalisation(material, classifier.pretrained))
    run.log_params(_params(recipe, material, device))

    def report(epoch: "Epoch") -> None:
        run.log_epoch(epoch)
        bars.note("training", f"epoch {epoch.number}/{recipe.epochs}, val {epoch.val.accuracy:.4f}")
        log.info("epoch", extra={"epoch": epoch.number, "val_loss": epoch.val.loss, "accuracy": epoch.val.accuracy})

    images = Images(cache.images, cache.labels, material.rows.train, material.rows.val)
    found = fit(network, images, recipe, device, report=report, progress=bars)
    rows = material.rows.calibration
    logits = logits_of(network, cache.images[rows], device)
    calibration = calibrate(logits, cache.labels[rows], material.manifest.classes)
    network.temperature.fill_(calibration.temperature)
    return Trained(network, recipe, found, calibration)


def _normalisation(material: Material, pretrained: str | None) -> tuple[list[float], list[float]]:
    if pretrained is not None:
        return [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's, which those weights were trained with
    return normalisation(material.cache, material.rows.train)


def _params(recipe: Recipe, material: Material, device: "Device") -> dict[str, object]:
    splits = {f"images_{split}": sum(counts.values()) for split, counts in material.manifest.counts().items()}
    return {
        **recipe.model_dump(),
        **splits,
        "dataset_id": material.manifest.id,
        "classes": len(material.manifest.classes),
        "images_trained_on": len(material.rows.train),
        "images_left_out_as_leaks": material.rows.left_out,
        "device": device.name,
        "precision": str(device.autocast).removeprefix("torch."),
        "threads": device.threads,
    }


def _export(folder: Path, material: Material, trained: Trained, run: Run) -> Bundle:
    from medloop.nets import TrainingImages, export_bundle
    from medloop.nets.export import REFERENCE_IMAGES

    cache, calibration = material.cache, trained.calibration
    card = Card(
        model=material.manifest.name,
        classes=material.manifest.classes,
        preparation=material.spec,
        architecture=trained.recipe.architecture,
        temperature=calibration.temperature,
        conformal=calibration.conformal,
        operating_thresholds=calibration.operating_thresholds,
        dataset_id=material.manifest.id,
        run_id=run.id,
        git_commit=git_commit(),
        seed=trained.recipe.seed,
        packages=package_versions(),
        created_at=now(),
    )
    rows = material.rows.train[:: -(-len(material.rows.train) // REFERENCE_IMAGES)]
    held_out = cache.images[material.rows.calibration]
    training = TrainingImages(cache.images[rows], cache.labels[rows], hashes(material.manifest, rows), held_out)
    check = cache.images[material.rows.val[:256]]
    return export_bundle(folder, trained.network, card, training, check)


def _register(
    registry: Registry,
    run: Run,
    bundle: Bundle,
    material: Material,
    trained: Trained,
    objects: ObjectStore,
    model: str,
) -> Version:
    best, fit = trained.fit.best, trained.fit
    run.log_bundle(bundle.folder)
    run.log_files(_files(material, trained, objects))
    run.log_figures(
        {
            "best_epoch": best.number,
            "best_val_loss": best.val.loss,
            "best_val_accuracy": best.val.accuracy,
            "training_images_per_second": fit.images_per_second,
            "temperature": trained.calibration.temperature,
        }
    )
    tags = {TAG_DIGEST: bundle.digest, TAG_DATASET: material.manifest.id}
    version = patiently(registry.tracking_uri, lambda: registry.register(model, run.id, tags))
    patiently(registry.tracking_uri, lambda: registry.set_alias(model, CHALLENGER, version.version))
    return version


def _files(material: Material, trained: Trained, objects: ObjectStore) -> dict[str, str | bytes]:
    files: dict[str, str | bytes] = {
        "class_distribution.json": json.dumps(material.manifest.counts(), indent=1),
        "recipe.json": trained.recipe.model_dump_json(indent=1),
        "curves.png": curves_png(trained.fit.epochs),
    }
    try:
        files["leaks.json"] = load_leaks(objects, material.manifest.id).to_json()
    except NotFound:
        log.warning("the data set has no leak report; run `medloop dataset check`")
    return files


def _result(version: Version, bundle: Bundle, trained: Trained, clock: Clock) -> TrainingResult:
    best = trained.fit.best
    return TrainingResult(
        model=version.model,
        version=version.version,
        run_id=version.run_id,
        dataset_id=bundle.card.dataset_id,
        bundle_digest=bundle.digest,
        seconds=clock.seconds,
        images_per_second=round(trained.fit.images_per_second, 1),
        epochs=len(trained.fit.epochs),
        best_epoch=best.number,
        val=ValidationFigures(accuracy=best.val.accuracy, loss=best.val.loss),
    )
