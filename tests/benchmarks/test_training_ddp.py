"""That two processes do train, and how far their curves are said to lie apart."""

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


def test_two_processes_train_what_one_does() -> None:
    trainings = Trainings(size=28, images=64, epochs=2, steps=1, seeds=(0, 1))
    alone, together = curves(trainings), train(trainings, 2)
    assert [len(curve) for curve in together] == [2, 2]
    for mine, theirs in zip(alone, together, strict=True):
        losses = np.array([[epoch.train_loss, epoch.val_loss] for epoch in (*mine, *theirs)]).reshape(2, 2, 2)
        np.testing.assert_allclose(losses[1], losses[0], rtol=0.1)
        assert (losses[1, :, 0] != losses[0, :, 0]).all(), "each has normalised by its own part of the batch"
        assert min(epoch.images_per_second for epoch in theirs) > 0
