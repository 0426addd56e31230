"""What the timed parts train: the trainer's small network on drawn images, in epochs of a fixed number of steps."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from medloop.data.cache import open_cache
from medloop.nets import Architecture
from medloop.storage.objects import open_objects
from medloop.vision.phantoms import CLASSES
from medloop.vision.prepare import PreparationSpec
from medloop_trainer.checkpoint import About, Checkpoints
from medloop_trainer.device import Device
from medloop_trainer.images import Images
from medloop_trainer.loop import CHECKPOINT_STEPS
from medloop_trainer.modality import Moves
from medloop_trainer.recipe import Options, Recipe
from medloop_trainer.saver import Saver

from benchmarks.training import jpegs
from benchmarks.training.bench import Bench

BATCH = 64
JUDGED = 8
"""Validation images: judging an epoch is not what is measured."""
MOVES = Moves(turn=10.0, zoom=0.1, shift=0.08, horizontal_flip=True)


def architecture(size: int = jpegs.SIZE) -> Architecture:
    return Architecture(id="small-resnet", classes=len(CLASSES), channels=1, size=size)


def recipe(images: int, epochs: int, steps: int, size: int = jpegs.SIZE) -> Recipe:
    """The standard one, with these moves and epochs of at most so many steps."""
    options = Options(epochs=epochs, batch_size=BATCH, patience=0)
    settled = Recipe.settle(options, architecture="small-resnet", size=size, images=images, pretrained=None)
    return settled.model_copy(update={"moves": MOVES, "steps_per_epoch": min(steps, settled.steps_per_epoch)})


def learnt(bench: Bench) -> Images:
    """The drawn files, decoded, where the trainer would have them: all to learn from."""
    spec = PreparationSpec(mode="L", size=jpegs.SIZE)
    cache = open_cache(jpegs.version(bench), spec, bench.objects, bench.home.cache_dir)
    rows = np.arange(len(cache.labels))
    return Images(cache.images, cache.labels, rows, rows[:JUDGED])


@contextmanager
def saving(bench: Bench, of: Recipe, device: Device) -> Iterator[Saver]:
    """Checkpoints as a training stores them, gone afterwards."""
    about = About(
        run_id="b" * 32,
        model=jpegs.NAME,
        dataset_id="0" * 64,
        preparation=PreparationSpec(mode="L", size=of.size),
        architecture=architecture(of.size),
        recipe=of,
        checkpoint_steps=CHECKPOINT_STEPS,
        compiled=False,
        device=device.name,
        threads=device.threads,
        packages={},
    )
    with (
        tempfile.TemporaryDirectory(dir=bench.folder) as place,
        Saver(Checkpoints(open_objects(Path(place).as_uri()), about)) as saver,
    ):
        yield saver
