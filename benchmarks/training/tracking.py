"""What tracking costs: the time that the training thread spends on it, and the processor time of the thread beside."""

import time

import numpy as np
from medloop.vision.phantoms import CLASSES, phantom
from medloop_trainer.device import Device, choose_device
from medloop_trainer.images import Images
from medloop_trainer.loop import fit
from medloop_trainer.recipe import Recipe
from medloop_trainer.state import Epoch
from medloop_trainer.track import Run

from benchmarks.training.bare import network
from benchmarks.training.bench import Asked, Bench, say
from benchmarks.training.material import BATCH, JUDGED, architecture, recipe
from benchmarks.training.scores import Figures

SIZE = 28  # px
SETS = {"": 4_708, "_small": 546}
"""Training images of PneumoniaMNIST and, whose epochs are the shortest, of BreastMNIST."""
_LEAST_S = 10.0
"""Of epochs that are looked at, or so many as are asked for where those take longer."""
_PATIENCE_S = 30.0


def compare(bench: Bench, asked: Asked) -> Figures:
    say("what tracking costs …")
    device = choose_device()
    figures: Figures = {}
    for name, images in SETS.items():
        figures |= _share(bench, device, images, asked.repeats, name)
    return figures


def _share(bench: Bench, device: Device, count: int, repeats: int, name: str) -> Figures:
    images = _images(count)
    of = _recipe(count, repeats)
    run = Run.start(bench.registry, "tracking", "0" * 64, home=bench.home.home)
    run.log_params(of.model_dump())
    run.courier.drain(_PATIENCE_S)  # the connection is there, as it is for all epochs but the first
    before, inside = run.courier.seconds, 0.0

    def report(epoch: Epoch) -> None:
        nonlocal inside
        started = time.perf_counter()
        run.log_epoch(epoch)
        inside += time.perf_counter() - started

    started = time.perf_counter()
    fit(network(architecture(SIZE)), images, of, device, report=report)
    seconds = time.perf_counter() - started
    run.finish()
    beside = run.courier.seconds - before
    return {
        f"tracking_share{name}": (inside + beside) / seconds,
        f"tracking_ms_an_epoch{name}.training_thread": 1000 * inside / of.epochs,
        f"tracking_ms_an_epoch{name}.courier_cpu": 1000 * beside / of.epochs,
        f"tracking_epoch_s{name}": seconds / of.epochs,
    }


def _images(count: int) -> Images:
    pixels = np.stack([phantom(CLASSES[i % len(CLASSES)], i, 0, SIZE) for i in range(256)])
    rows = np.arange(count)
    return Images(pixels[rows % len(pixels)], rows % len(CLASSES), rows, rows[:JUDGED])


def _recipe(count: int, repeats: int) -> Recipe:
    steps = count // BATCH
    epochs = max(repeats, round(_LEAST_S / (steps * 0.08)))  # about 80 ms a step of 64 images of 28 px on two cores
    return recipe(count, epochs, steps, SIZE)
