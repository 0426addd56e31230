"""What the calibration split decides: temperature, conformal threshold and operating thresholds.

The split is used for nothing else, least of all for choosing the epoch, so that these numbers hold on new images from
the same source. Where it is small or lacks a class, they fall back to values that promise nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from medloop.bundle import Conformal
from numpy.typing import NDArray

from medloop_trainer.scores import log_softmax

COVERAGE = 0.95
_COLDEST, _HOTTEST = 0.1, 10.0
_PRIOR_SPREAD = 0.5  # of log T: what a temperature is believed to be before an image was seen
_LOWEST_CALL, _HIGHEST_CALL = 0.01, 0.99


@dataclass(frozen=True, slots=True)
class Calibration:
    temperature: float
    conformal: Conformal
    operating_thresholds: dict[str, float]


def calibrate(logits: NDArray[np.float32], labels: NDArray[np.int64], classes: Sequence[str]) -> Calibration:
    """Calibrate on `logits` [N, K] and `labels` [N] of the calibration split, N ≥ 0."""
    temperature = find_temperature(logits, labels)
    probabilities = np.exp(log_softmax(logits / temperature))
    thresholds = {name: youden_threshold(probabilities[:, k], labels == k) for k, name in enumerate(classes)}
    return Calibration(temperature, conformal(probabilities, labels), thresholds)


def find_temperature(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The temperature in [0.1, 10] that makes `labels` likeliest (Guo et al. 2017), as a float32 value.

    log T has a normal prior about 0 with spread 0.5. It weighs little beside a few dozen images, and keeps a split that
    is tiny, or holds no mistake, from running off to one end; without images T is 1. Found by golden section on log T.
    """
    if len(labels) == 0:
        return 1.0

    def cost(log_t: float) -> float:
        loss = -log_softmax(logits / math.exp(log_t))[np.arange(len(labels)), labels].sum()
        return float(loss) + log_t**2 / (2 * _PRIOR_SPREAD**2)

    low, high = math.log(_COLDEST), math.log(_HOTTEST)
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(40):  # ends within 1e-8 of log T
        left, right = high - golden * (high - low), low + golden * (high - low)
        if cost(left) < cost(right):
            high = right
        else:
            low = left
    return float(np.float32(math.exp((low + high) / 2)))


def conformal(probabilities: NDArray[np.floating], labels: NDArray[np.int64], coverage: float = COVERAGE) -> Conformal:
    """The split conformal threshold of scores 1 − p(true class) (LAC; Vovk et al. 2005, Sadinle et al. 2019).

    The ⌈(n + 1) · coverage⌉-th smallest score covers a new image with at least `coverage`; with too few images for
    that (n < 19 at .95) the threshold is 1, which rules nothing out.
    """
    n = len(labels)
    rank = math.ceil((n + 1) * coverage)
    if rank > n:
        return Conformal(coverage=coverage, threshold=1.0, images=n)
    scores = np.sort(1.0 - probabilities[np.arange(n), labels])
    # A hair up, so that rounding in 1 − threshold cannot rule out the very image that set it.
    return Conformal(coverage=coverage, threshold=min(1.0, float(scores[rank - 1]) + 1e-7), images=n)


def youden_threshold(probabilities: NDArray[np.floating], positive: NDArray[np.bool_]) -> float:
    """The probability above which a class is called: where sensitivity + specificity is largest (Youden 1950), half
    way between neighbouring images, within [.01, .99]. 0.5 where images with or without the class are missing."""
    if positive.all() or not positive.any():
        return 0.5
    order = np.argsort(probabilities, kind="stable")
    ascending, hits = probabilities[order], positive[order]
    # Calling everything above place i: positives at or below it are missed, negatives there are rightly not called.
    missed = np.cumsum(hits)[:-1] / hits.sum()
    spared = np.cumsum(~hits)[:-1] / (~hits).sum()
    between = ascending[:-1] < ascending[1:]
    if not between.any():
        return 0.5
    gain = np.where(between, spared - missed, -np.inf)
    best = int(gain.argmax())
    return float(np.clip((ascending[best] + ascending[best + 1]) / 2, _LOWEST_CALL, _HIGHEST_CALL))
