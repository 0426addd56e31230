"""What the loop learns from and is judged by, and how its pixels are fetched: from an array, or streamed."""

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from medloop.data.shards import Shards
from numpy.typing import NDArray

from medloop_trainer.ranks import ALONE, Ranks
from medloop_trainer.sampler import Sampler

Fetched = Generator[tuple[NDArray[np.int64], NDArray[np.uint8]], None, None]


class Pixels(Protocol):
    """uint8 [N, S, S, C] on a disk, in memory or in objects, of which indexing gives copies or views."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: NDArray[np.int64] | slice, /) -> NDArray[np.uint8]: ...


@dataclass(frozen=True, slots=True)
class Images:
    """`pixels` uint8 [N, S, S, C] of a whole data set version, `labels` int64 [N], and the rows of two splits.

    `shards` [N] are those that the rows lie in when they are streamed; None when all fit into one.
    """

    pixels: Pixels
    labels: NDArray[np.int64]
    train: NDArray[np.int64]
    val: NDArray[np.int64]
    shards: NDArray[np.int32] | None = None

    @property
    def train_shards(self) -> NDArray[np.int32] | None:
        """Of the training images."""
        return None if self.shards is None else self.shards[self.train]


def fetch(
    pixels: Pixels,
    batches: Iterable[NDArray[np.int64]],
    between: Callable[[], object] = lambda: None,
    *,
    aside: bool = False,
) -> Fetched:
    """Each of `batches`, which are rows, with its pixels; what is streamed is read ahead (see `Shards.stream`)."""
    if isinstance(pixels, Shards):
        yield from pixels.stream(batches, between, aside=aside)
    else:
        for rows in batches:
            yield rows, pixels[rows]


class Feed:
    """The batches of a training, by step: its first `steps`, mostly one after another."""

    def __init__(
        self,
        images: Images,
        sampler: Sampler,
        steps: int,
        ranks: Ranks = ALONE,
        between: Callable[[], object] = lambda: None,
    ) -> None:
        """Of several `ranks` each gets its own part of a batch. `between` is called now and then while pixels are
        waited for, and may raise to end that."""
        self._images, self._sampler, self._steps = images, sampler, steps
        self._ranks, self._between = ranks, between
        self._next = 0
        self._fetched: Fetched | None = None

    def at(self, step: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Pixels uint8 [B, S, S, C] and labels int64 [B] of what `step` shows."""
        if self._fetched is None or step != self._next:
            self.close()
            self._fetched = fetch(self._images.pixels, self._batches(step), self._between)
        rows, pixels = next(self._fetched)
        self._next = step + 1
        return pixels, self._images.labels[rows]

    def close(self) -> None:
        """Read ahead no more."""
        if self._fetched is not None:
            self._fetched.close()
            self._fetched = None

    def _batches(self, step: int) -> Iterable[NDArray[np.int64]]:
        images, sampler, share = self._images, self._sampler, self._ranks.share
        return (images.train[share(sampler.batch(number))] for number in range(step, self._steps))
