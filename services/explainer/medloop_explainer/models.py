"""Model versions held ready for explaining: verified, rebuilt in torch, with a background for SHAP."""

import logging
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from medloop.bundle import Bundle, Pixels
from medloop.data.manifest import Manifest, load_manifest
from medloop.errors import MedLoopError, NoModel
from medloop.registry import CHAMPION, Registry, Version, fetch_bundle
from medloop.schemas import ModelRef
from medloop.settings import HomeSettings
from medloop.storage.objects import ObjectStore
from medloop.vision.prepare import prepare

if TYPE_CHECKING:
    from medloop.nets import ServedNetwork
    from torch import Tensor

logger = logging.getLogger(__name__)

HELD = 2
"""Versions in memory: the champion and the challenger somebody compares it with."""
BACKGROUND_IMAGES = 32


@dataclass(frozen=True, slots=True)
class Model:
    """One version, ready. `background` uint8 [M, S, S, C] are training images, M = 0 where none could be had."""

    ref: ModelRef
    bundle: Bundle
    network: "ServedNetwork"
    background: Pixels


class Models:
    """The versions that were asked for last, by bundle digest."""

    def __init__(self, registry: Registry, home: HomeSettings) -> None:
        self.registry = registry
        self.home = home
        self._held: OrderedDict[str, Model] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, model: str, version: str | None) -> Version:
        """The registered version, by default the champion; raises NotFound or NoModel."""
        if version is not None:
            return self.registry.version(model, version)
        champion = self.registry.at_alias(model, CHAMPION)
        if champion is None:
            raise NoModel(f"{model} has no champion; name a version, or approve one: medloop approve")
        return champion

    def open(self, version: Version, objects: ObjectStore) -> Model:
        """The version ready for explaining, its background from `objects` if it is not kept here. It need not be
        approved, but must be the bundle that was registered and give its golden answers: raises UntrustedModel
        otherwise."""
        from medloop.nets import rebuild

        bundle = fetch_bundle(self.registry, version, self.home.bundles_dir)
        ref = ModelRef(
            name=version.model,
            version=version.version,
            run_id=version.run_id,
            dataset_id=bundle.card.dataset_id,
            bundle_digest=bundle.digest,
            engine="torch",
        )
        background = self._background(bundle, objects)  # without the lock: a set may wait long for it
        with self._lock:
            held = self._held.pop(bundle.digest, None)
            # A background that could not be had is tried for again.
            if held is None or len(held.background) < len(background):
                network = held.network if held else rebuild(bundle).requires_grad_(False)
                held = Model(ref, bundle, network, background)
            self._held[bundle.digest] = held
            while len(self._held) > HELD:
                self._held.popitem(last=False)
        return held

    def _background(self, bundle: Bundle, objects: ObjectStore) -> Pixels:
        """Training images, kept on this disk so that explaining goes on while objects are down."""
        with self._lock:
            held = self._held.get(bundle.digest)
        if held is not None and len(held.background):
            return held.background
        path = self.home.cache_dir / "backgrounds" / f"{bundle.digest}.npy"
        try:
            kept: Pixels = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            pass  # the first time
        except (OSError, ValueError, EOFError) as exc:
            logger.warning("the kept background cannot be read and is made again: %s", exc)
        else:
            return kept
        try:
            manifest = load_manifest(objects, bundle.card.dataset_id)
            rows = [manifest.rows[row] for row in take_in_turn(manifest, "train", BACKGROUND_IMAGES)]
            images = np.stack([prepare(objects.get(row.location), bundle.card.preparation) for row in rows])
        except MedLoopError as exc:
            logger.warning("no training images for SHAP, which measures from the mean intensity: %s", exc.detail)
            spec = bundle.card.preparation
            return np.zeros((0, spec.size, spec.size, spec.channels), np.uint8)
        _keep(path, images)
        return images


def take_in_turn(manifest: Manifest, split: str, count: int) -> list[int]:
    """Rows of at most `count` images of `split`, one class after another, so that every class is there. Rows stand in
    the order of their hashes, which is as good as random and always the same."""
    by_class: dict[str, list[int]] = {label: [] for label in manifest.classes}
    for number, row in enumerate(manifest.rows):
        if row.split == split:
            by_class[row.label].append(number)
    turns = [(turn, label, row) for label, rows in by_class.items() for turn, row in enumerate(rows)]
    return [row for _, _, row in sorted(turns)[:count]]


def to_tensor(pixels: Pixels) -> "Tensor":
    """uint8 [N, S, S, C] → float32 [N, C, S, S], still in [0, 255]."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32))


def _keep(path: Path, images: Pixels) -> None:
    temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.save(file, images, allow_pickle=False)
        temporary.replace(path)
    except OSError as exc:
        # Explaining goes on without: the images are in memory.
        logger.warning("SHAP's background cannot be kept on this disk: %s", exc.strerror)
