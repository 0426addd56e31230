"""Means over seeds, with intervals over images, and paired differences, with intervals over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

import numpy as np
from medloop_evaluator.metrics import Scorer
from medloop_evaluator.resample import Resampling, basic, percentile, wilson
from numpy.typing import NDArray

COVERAGE = 0.95


@dataclass(frozen=True, slots=True)
class Average:
    """A mean over seeds, its 95 % interval, and the seeds' standard deviation, None of a single one."""

    mean: float
    low: float
    high: float
    std: float | None


def over_images(scorers: Sequence[Scorer], metric: str, clusters: NDArray[np.int64] | None = None) -> Average:
    """The mean of `metric` over `scorers`, one a seed, all of the same images.

    The interval is over images: a replicate draws the same ones for every seed and takes the mean, so that what seeds
    have in common is not counted as many times as there are seeds. Accuracy of independent images has Wilson's, of the
    mean share of right answers, which is no narrower than the bootstrap's would be.
    """
    first = scorers[0]
    if any(not np.array_equal(scorer.labels, first.labels) for scorer in scorers):
        raise ValueError("these are scores of different images")
    resampling = Resampling(first.labels, clusters)
    values = [float(getattr(scorer.score(np.ones((1, len(first.labels)))), metric)[0]) for scorer in scorers]
    mean = fmean(values)
    if metric == "accuracy" and clusters is None:
        low, high = wilson(mean * len(first.labels), len(first.labels))
        return Average(mean, low, high, spread(values))
    replicates = np.concatenate(
        [
            np.mean([getattr(scorer.score(weights), metric) for scorer in scorers], axis=0)
            for weights in resampling.blocks()
        ]
    )
    low, high = basic(mean, replicates) if metric == "ece" else percentile(replicates)
    return Average(mean, low, high, spread(values))


def over_seeds(values: Sequence[float]) -> Average:
    """The mean of one value a seed and Student's interval of it (1908): how far it rests on which seeds were taken. One
    seed says nothing of that, and leaves every value possible."""
    from scipy.special import stdtrit  # type: ignore[import-untyped]  # here: only one part needs it

    mean, std = fmean(values), spread(values)
    if std is None:
        return Average(mean, -np.inf, np.inf, None)
    reach = float(stdtrit(len(values) - 1, (1 + COVERAGE) / 2)) * std / sqrt(len(values))
    return Average(mean, mean - reach, mean + reach, std)


def spread(values: Sequence[float]) -> float | None:
    """The sample's standard deviation."""
    return stdev(values) if len(values) > 1 else None


def without_temperature(probabilities: NDArray[np.floating], temperature: float) -> NDArray[np.float64]:
    """What the network would have said at T = 1: softmax(z / T) gives z up to a constant, which softmax forgets.

    A probability that float32 has rounded to nothing counts as the smallest that it can hold.
    """
    scaled = temperature * np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float32).tiny))
    powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))
