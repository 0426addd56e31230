"""Bootstrap weights and the intervals made of them.

A bootstrap replicate is kept as how often each image was drawn, `weights` [B, N], so that every metric of all
replicates is a few matrix products (Efron & Tibshirani 1993).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal

import numpy as np
from medloop.schemas import Estimate
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

REPLICATES = 1000
_BLOCK_ELEMENTS = 4_000_000  # weights held at once: 32 MB
_Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


def clusters(groups: list[str]) -> Integers | None:
    """Number the groups: int64 [N]. An image without a group ("") is one of its own.

    None when no two images share a group: resampling by group would say nothing else than by image. All images in
    one group stay one group, of which resampling says nothing; whoever makes an interval must see to that.
    """
    keys = [f"group {group}" if group else f"image {index}" for index, group in enumerate(groups)]
    _, numbers = np.unique(np.array(keys, dtype=np.str_), return_inverse=True)
    return numbers.astype(np.int64) if len(np.unique(numbers)) < len(groups) else None


@dataclass(frozen=True, slots=True)
class Resampling:
    """How images are redrawn: whole groups where images come in groups, else stratified by class.

    `strata` int64 [N] are class numbers, `clusters` int64 [N] group numbers from 0, or None.
    """

    strata: Integers
    clusters: Integers | None
    replicates: int = REPLICATES
    seed: int = 0

    @property
    def units(self) -> Integers:
        """Which independent unit each image belongs to, int64 [N]: its group, or itself."""
        return np.arange(len(self.strata)) if self.clusters is None else self.clusters

    @property
    def method(self) -> Literal["bootstrap", "cluster-bootstrap"]:
        return "bootstrap" if self.clusters is None else "cluster-bootstrap"

    def blocks(self) -> Iterator[Floats]:
        """Weights [b, N] of all replicates, some at a time so that memory stays bounded."""
        rng = np.random.default_rng(self.seed)
        size = max(1, _BLOCK_ELEMENTS // len(self.strata))
        for start in range(0, self.replicates, size):
            yield self._weights(rng, min(size, self.replicates - start))

    def _weights(self, rng: np.random.Generator, count: int) -> Floats:
        if self.clusters is not None:
            total = int(self.clusters.max()) + 1
            return _draw(rng, count, total)[:, self.clusters]
        weights = np.zeros((count, len(self.strata)))
        for stratum in np.unique(self.strata):
            members = np.flatnonzero(self.strata == stratum)
            weights[:, members] = _draw(rng, count, len(members))
        return weights


def _draw(rng: np.random.Generator, count: int, items: int) -> Floats:
    """How often each of `items` is drawn in `items` draws with replacement: [count, items]."""
    drawn = rng.integers(items, size=(count, items)) + (np.arange(count) * items)[:, None]
    return np.bincount(drawn.ravel(), minlength=count * items).reshape(count, items).astype(np.float64)


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927); (0, 1) when nothing was tried.

    `successes` may be a fraction: of all figures in [0, 1] with the same mean a proportion varies most, so that the
    interval of any other is no wider.
    """
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    scale = 1 + _Z95**2 / trials
    centre = (share + _Z95**2 / (2 * trials)) / scale
    half = _Z95 * sqrt(share * (1 - share) / trials + _Z95**2 / (4 * trials**2)) / scale
    # At the ends the bound is exactly 0 or 1; rounding must not put it a hair inside.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == trials else centre + half)


def newcombe(both: int, first: int, second: int, neither: int) -> tuple[float, float]:
    """The 95 % score interval of the difference first − second of two paired proportions (Newcombe 1998, method 10).

    The arguments count pairs: both succeeded, only the first, only the second, neither; at least one pair.
    """
    pairs = both + first + second + neither
    share_1, share_2 = (both + first) / pairs, (both + second) / pairs
    low_1, high_1 = wilson(both + first, pairs)
    low_2, high_2 = wilson(both + second, pairs)
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    product = float(both * neither - first * second)
    if product > 0:
        product = max(0.0, product - pairs / 2)  # his continuity correction
    correlation = product / sqrt(margins) if margins else 0.0

    def reach(a: float, b: float) -> float:
        return sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    difference = (first - second) / pairs
    return (
        difference - reach(share_1 - low_1, high_2 - share_2),
        difference + reach(high_1 - share_1, share_2 - low_2),
    )


def degenerate(low: float, high: float) -> bool:
    """Whether an interval has no width: all replicates were the same, which is no proof that all images are."""
    return high - low < 1e-9  # rounding of sums in another order


def percentile(replicates: Floats) -> tuple[float, float]:
    """The middle 95 % of the replicates [B]; a replicate in which the metric is undefined (NaN) is left out."""
    low, high = np.nanpercentile(replicates, [2.5, 97.5])
    return float(low), float(high)


def basic(value: float, replicates: Floats) -> tuple[float, float]:
    """The percentile interval reflected at `value`, for a figure that resampling itself pushes up, as it does with
    calibration error. Widened to hold `value`, and never below zero."""
    low, high = percentile(replicates)
    return max(0.0, min(2 * value - high, value)), max(2 * value - low, value)


def means(columns: Mapping[str, tuple[NDArray[Any], NDArray[np.bool_]]], resampling: Resampling) -> dict[str, Estimate]:
    """The mean of each column and its 95 % interval. A column is values [N] in [0, 1] and, bool [N], the images it is
    taken over; where there are none, it is left out.

    Intervals are made as those of the metrics: a share (values 0 and 1) of independent images has Wilson's, the rest is
    bootstrapped; where all replicates are equal, it is Wilson's for as many images or groups as there are, and one
    group alone leaves every value possible.
    """
    there = {name: column for name, column in columns.items() if column[1].any()}
    if not there:
        return {}
    among = np.stack([counted for _, counted in there.values()], axis=1).astype(np.float64)  # [N, M]
    values = np.stack([value for value, _ in there.values()], axis=1) * among
    blocks = [(weights @ values, weights @ among) for weights in resampling.blocks()]
    sums, counts = (np.concatenate(part) for part in zip(*blocks, strict=True))  # [B, M]
    replicates = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    return {
        name: _mean(value[counted], np.unique(resampling.units[counted]).size, replicates[:, place], resampling)
        for place, (name, (value, counted)) in enumerate(there.items())
    }


def _mean(values: NDArray[Any], units: int, replicates: Floats, resampling: Resampling) -> Estimate:
    """The mean of `values` [n], n ≥ 1, which come from so many independent units, and `replicates` [B] of it."""
    value, grouped = float(values.mean()), resampling.clusters is not None
    if not grouped and np.isin(values, (0, 1)).all():
        low, high = wilson(float(values.sum()), len(values))
        return Estimate(value=value, low=low, high=high, method="wilson")
    low, high = percentile(replicates)
    method: str = resampling.method
    if grouped and units == 1:
        low, high = 0.0, 1.0  # one group says nothing about how groups differ
    elif degenerate(low, high):
        low, high = wilson(value * units, units)
        method = "cluster-wilson" if grouped else "wilson"
    return Estimate(value=value, low=low, high=high, method=method)
