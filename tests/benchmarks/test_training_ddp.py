"""What the comparison of processes trains, and how far curves are said to lie apart. That two processes do train
together, tests/trainer/test_ranks.py shows."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.training.ddp import over_seeds
from benchmarks.training.targets import verdict
from benchmarks.training.together import Trainings, curves, train


def test_curves_are_held_against_the_spread_of_seeds() -> None:
    one = np.array([[3.0, 1.0], [1.0, 2.0], [2.0, 3.0]])  # of both epochs the seeds' standard deviation is 1
    assert over_seeds(one, one[::-1]) == 0, "the same mean curve"
    assert over_seeds(one, one + 0.5) == pytest.approx(0.5)
    assert over_seeds(one, one + np.array([0.5, -0.5])) == pytest.approx(0.5), "apart is apart on either side"
    assert [verdict("ddp_val_loss_over_seeds", value)[1] for value in (0.9, 1.1)] == ["met", "missed"]


def test_each_seed_has_a_curve_of_its_own_and_the_same_one_again() -> None:
    trainings = Trainings(size=28, images=64, epochs=2, steps=1, seeds=(0, 1))
    one, other = ([(epoch.train_loss, epoch.val_loss) for epoch in curve] for curve in curves(trainings))
    assert len(one) == len(other) == 2
    assert one != other
    [[first, *_]] = curves(replace(trainings, seeds=(0,)))
    assert (first.train_loss, first.val_loss) == one[0]


def test_a_process_that_fails_is_told() -> None:
    with pytest.raises(RuntimeError, match="1 processes did not train together"):
        train(Trainings(size=8, images=64, epochs=2, steps=1), 1)  # too small to be drawn
