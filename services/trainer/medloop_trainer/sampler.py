"""Which images a step shows: a function of the seed and of the step's number, so that it needs no state."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from medloop_trainer.randomness import generator
from medloop_trainer.recipe import Recipe

WINDOW = 16
"""Shards that are shuffled together."""


class Sampler:
    """Passes over N training images in random order, cut into batches of equal size, give or take one.

    A pass shows as many images as there are, classes in the recipe's shares: an image of a rare class stands in it
    more than once, one of a common class perhaps not at all. With classes of one size, or natural sampling, every
    image stands in it once. An epoch may be shorter than a pass (a budget can make it so): the next one goes on where
    it ended.

    Of more images than `WINDOW` shards hold, a pass shows one window of so many shards after another, drawn anew for
    every pass and shuffled within, whether they are streamed or not: so that streaming needs to hold two windows only,
    and comes to the same weights. Rows lie in the order of their hashes, so that a window is a random sample, too.
    """

    def __init__(self, labels: NDArray[np.int64], recipe: Recipe, shards: NDArray[np.int32] | None = None) -> None:
        """`labels` [N] are those of the training images, N ≥ 1, and `shards` [N] where they lie, from 0; one by
        itself."""
        self._seed = recipe.seed
        self._labels = labels.astype(np.min_scalar_type(labels.max()))  # kept small: training holds it to its end
        counts = np.bincount(labels)
        self.shares: NDArray[np.float64] = recipe.shown_shares(counts.tolist())
        """Shares [K] of what is shown, by class."""
        self.batches = max(1, len(labels) // recipe.batch_size)
        """In one pass."""
        self._shards = np.zeros(len(labels), np.int32) if shards is None else shards
        self.windows = -(-(int(self._shards.max()) + 1) // WINDOW)
        """In one pass."""
        self._present = (-1, np.zeros(0, np.int32))

    def batch(self, step: int) -> NDArray[np.int64]:
        """Places in the labels, int64 [B], of what step `step` (from 0) shows, over all ranks together."""
        number, place = divmod(step, self.batches)
        if self._present[0] != number:
            self._present = (number, self._order(number))
        return self._present[1][self.shown(place) : self.shown(place + 1)].astype(np.int64)

    def shown(self, steps: int) -> int:
        """How many images the first `steps` steps show together."""
        passes, rest = divmod(steps, self.batches)
        n, batches = len(self._labels), self.batches
        return passes * n + rest * (n // batches) + min(rest, n % batches)

    def _order(self, number: int) -> NDArray[np.int32]:
        source = generator(self._seed, "order", number)
        bounds = np.rint(np.concatenate([[0.0], np.cumsum(len(self._labels) * self.shares)])).astype(int)
        order = np.concatenate([self._of_class(k, int(count), source) for k, count in enumerate(np.diff(bounds))])
        shuffled = order[torch.randperm(len(order), generator=source).numpy()]
        if self.windows == 1:
            return np.asarray(shuffled)
        place = torch.randperm(int(self._shards.max()) + 1, generator=source).numpy()
        window = (place * self.windows // len(place)).astype(np.min_scalar_type(self.windows))
        return np.asarray(shuffled[np.argsort(window[self._shards[shuffled]], kind="stable")])

    def _of_class(self, k: int, count: int, source: torch.Generator) -> NDArray[np.int32]:
        """`count` places of class k: whole passes over it, the last one cut short."""
        places = np.flatnonzero(self._labels == k).astype(np.int32)
        rounds = -(-count // max(1, len(places)))
        passes = [places[torch.randperm(len(places), generator=source).numpy()] for _ in range(rounds)]
        return np.concatenate([*passes, places[:0]])[:count]

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        """The batches of the first pass."""
        return (self.batch(step) for step in range(self.batches))


def share(batch: NDArray[np.int64], rank: int, world: int) -> NDArray[np.int64]:
    """What rank `rank` of `world` takes of a batch, so that all ranks together take each image once."""
    return batch[rank::world]
