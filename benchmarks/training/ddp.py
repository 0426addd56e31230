"""Two processes that share the processors beside one that has them all: their speed, and what they learn."""

from collections.abc import Sequence
from statistics import median

import numpy as np
from numpy.typing import NDArray

from benchmarks.training.bench import Asked, Bench, say
from benchmarks.training.material import BATCH
from benchmarks.training.scores import Figures
from benchmarks.training.together import Curve, Trainings, train

SEEDS = (0, 1, 2, 3, 4)
"""Whose spread is the noise that a difference is held against."""
_WORLDS = (1, 2)
_EPOCHS, _STEPS = 8, 8  # of a training whose curve is drawn: until little more is learnt
_CURVES = ("train_loss", "val_loss")


def compare(bench: Bench, asked: Asked) -> Figures:
    return speed(asked) | learning(asked.seeds or SEEDS)


def speed(asked: Asked) -> Figures:
    """Images a second while they train, in turns; an epoch before warms up."""
    say("two processes beside one …")
    wanted = Trainings(size=64, images=asked.steps * BATCH, epochs=2, steps=asked.steps)
    turns = []
    for number in range(asked.repeats):
        worlds = _WORLDS if number % 2 == 0 else _WORLDS[::-1]
        turns.append({world: train(wanted, world)[0][-1].images_per_second for world in worlds})
    return {
        "ddp2_over_single": median(turn[2] / turn[1] for turn in turns),
        "ddp_images_per_second.single": median(turn[1] for turn in turns),
        "ddp_images_per_second.two": median(turn[2] for turn in turns),
    }


def learning(seeds: tuple[int, ...]) -> Figures:
    """Loss curves at one global batch, the same seeds by one process and by two."""
    say("the loss curves of two processes and of one …")
    wanted = Trainings(size=28, images=_STEPS * BATCH, epochs=_EPOCHS, steps=_STEPS, seeds=seeds)
    one, two = (train(wanted, world) for world in _WORLDS)
    figures: Figures = {}
    for name in _CURVES:
        alone, together = _values(one, name), _values(two, name)
        figures[f"ddp_{name}_last.single"] = float(alone[:, -1].mean())
        figures[f"ddp_{name}_last.two"] = float(together[:, -1].mean())
        if len(seeds) > 1:
            figures[f"ddp_{name}_over_seeds"] = over_seeds(alone, together)
    return figures


def over_seeds(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """How far the mean curves of `one` and `other`, [seeds ≥ 2, epochs] each, lie apart, in standard deviations
    between the seeds of `one`; both as root mean squares over epochs."""
    apart = one.mean(axis=0) - other.mean(axis=0)
    spread = one.std(axis=0, ddof=1)
    return float(np.sqrt(np.square(apart).mean() / np.square(spread).mean()))


def _values(curves: Sequence[Curve], name: str) -> NDArray[np.float64]:
    return np.array([[getattr(epoch, name) for epoch in curve] for curve in curves])
