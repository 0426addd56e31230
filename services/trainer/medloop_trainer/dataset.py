"""From a data set version to what the loop eats: which preparation fits, which images may be learnt from."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from medloop.data.leaks import LeakReport, leaked_rows, load_leaks
from medloop.data.manifest import Manifest, lineage, load_manifest
from medloop.data.parallel import ProgressFn
from medloop.errors import InvalidDataset, NotFound
from medloop.storage.objects import ObjectStore
from medloop.vision.decode import decode
from medloop.vision.prepare import PreparationSpec
from numpy.typing import NDArray

from medloop_trainer.prepared import Prepared, open_prepared
from medloop_trainer.recipe import Options
from medloop_trainer.settings import PixelSettings

log = logging.getLogger(__name__)

_LOOKED_AT = 48  # images; colour and size are the same throughout almost every data set


@dataclass(frozen=True, slots=True)
class Looks:
    """Whether any image looked at has colour, and the longest side of them, px."""

    colour: bool
    largest_side: int

    def spec(self, options: Options) -> PreparationSpec:
        return PreparationSpec(mode="RGB" if self.colour else "L", size=options.choose_size(self.largest_side))


def look_at(manifest: Manifest, objects: ObjectStore) -> Looks:
    """Decode some training images, evenly spread over the rows (which are ordered by hash, so this is a random draw
    that is the same every time)."""
    rows = manifest.columns.rows_of("train")
    colour, side = False, 1
    for place in np.unique(np.linspace(0, len(rows) - 1, _LOOKED_AT).astype(int)):
        pixels = decode(objects.get(manifest.rows[rows[place]].location)).pixels
        colour = colour or _has_colour(pixels)
        side = max(side, *pixels.shape[:2])
    return Looks(colour, side)


def _has_colour(pixels: NDArray[np.uint8] | NDArray[np.uint16]) -> bool:
    return pixels.shape[2] >= 3 and not (pixels[..., :1] == pixels[..., 1:3]).all()


@dataclass(frozen=True, slots=True)
class CleanRows:
    """The rows to train on, to choose the epoch by and to calibrate on, int64 each, without those whose pixels stand
    in a split that judges them; `left_out` counts these."""

    train: NDArray[np.int64]
    val: NDArray[np.int64]
    calibration: NDArray[np.int64]
    left_out: int


def clean_rows(manifest: Manifest) -> CleanRows:
    """Leave out what would let a split judge itself.

    Raises InvalidDataset when there is one class only, a class has no image left to learn from, or there is none to
    choose the epoch by.
    """
    if len(manifest.classes) < 2:
        raise InvalidDataset(
            f"All images are of one class, {', '.join(manifest.classes) or 'without a name'}; add images of another: "
            "there is nothing to tell apart."
        )
    columns, kept, left_out = manifest.columns, {}, 0
    for split in ("train", "val", "calibration"):
        rows, leaked = columns.rows_of(split), leaked_rows(manifest, split)
        kept[split] = np.delete(rows, np.searchsorted(rows, leaked))
        left_out += len(leaked)
    counts = np.bincount(columns.labels[kept["train"]], minlength=len(manifest.classes))
    missing = [name for name, count in zip(manifest.classes, counts, strict=True) if not count]
    if missing:
        raise InvalidDataset(
            f"There is no training image of {', '.join(missing)} (copies of images in other splits do not count); "
            "add images of it or leave the class out."
        )
    if not len(kept["val"]):
        raise InvalidDataset("There is no validation image to choose the epoch by; add images or a val split.")
    return CleanRows(kept["train"], kept["val"], kept["calibration"], left_out)


@dataclass(frozen=True, slots=True)
class Material:
    """What is trained on: the version, its prepared pixels, the rows that may be learnt from, and its leak report.
    With it in hand, objects are needed no more unless pixels are streamed."""

    manifest: Manifest
    spec: PreparationSpec
    cache: Prepared
    rows: CleanRows
    leaks: LeakReport | None


def gather(
    objects: ObjectStore,
    dataset_id: str,
    model: str,
    choose_spec: Callable[[Manifest], PreparationSpec],
    cache_dir: Path,
    progress: ProgressFn | None = None,
    settings: PixelSettings | None = None,
) -> Material:
    """Fetch the version as lineage `model` has it, and decode it unless that was done before, into `cache_dir` or
    objects as `settings` (by itself: the environment) say. The version's rows lie in `cache_dir`, too, if it has room.

    Raises NotFound, InvalidDataset (also for a manifest that does not give its id any more), StorageUnavailable,
    StorageFull.
    """
    manifest = _version(objects, dataset_id, model, cache_dir)
    rows = clean_rows(manifest)
    try:
        leaks = load_leaks(objects, dataset_id)
    except NotFound:
        log.warning("the data set has no leak report; run `medloop dataset check`")
        leaks = None
    spec = choose_spec(manifest)
    prepared = open_prepared(manifest, spec, objects, cache_dir, settings or PixelSettings(), progress)
    return Material(manifest, spec, prepared, rows, leaks)


def _version(objects: ObjectStore, dataset_id: str, model: str, folder: Path) -> Manifest:
    try:
        return load_manifest(objects, dataset_id, name=model, folder=folder)
    except NotFound as exc:
        if dataset_id in lineage(objects, model):
            raise
        raise NotFound(
            f"Data set {model} has no version {dataset_id[:16]} in {objects.url}; build it with medloop dataset build, "
            "or name the place that has it with MEDLOOP_OBJECTS_URL."
        ) from exc


def normalisation(cache: Prepared, rows: NDArray[np.int64]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the pixels of `rows`, in [0, 1]: one value a channel."""
    sample = cache.images[rows[:: max(1, len(rows) // 2000)]].astype(np.float32) / 255
    # A set of blank images must not divide by zero.
    return sample.mean(axis=(0, 1, 2)).tolist(), np.maximum(sample.std(axis=(0, 1, 2)), 0.01).tolist()


def hashes(manifest: Manifest, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """uint8 [N, 32]: the SHA-256 of the stored bytes of `rows`."""
    found = b"".join(bytes.fromhex(manifest.rows[i].byte_hash) for i in rows.tolist())
    return np.frombuffer(found, dtype=np.uint8).reshape(-1, 32)
