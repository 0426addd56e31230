"""How well probabilities agree with labels: figures with 95 % intervals, per class, confusion, calibration, ROC.

Everywhere `probabilities` is float [N, K] with rows summing to one, `labels` int64 [N] in [0, K).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from medloop.errors import InvalidRequest
from medloop.schemas import ClassReport, Estimate
from numpy.typing import NDArray

from medloop_evaluator.resample import Floats, Integers, Resampling, basic, degenerate, percentile, wilson

CALIBRATION_BINS = 15  # equal width; the usual choice since Guo et al. 2017
_SMALLEST_PROBABILITY = 1e-12  # float32 softmax can give 0; its logarithm must stay finite

METRICS = ("accuracy", "precision", "recall", "f1", "auc", "ece", "nll", "brier")
_MACRO = ("precision", "recall", "f1", "auc")
_LARGEST = {"nll": -float(np.log(_SMALLEST_PROBABILITY)), "brier": 2.0}  # of the others 1; the smallest is 0


@dataclass(frozen=True, slots=True)
class Scores:
    """The metrics of one or many weightings of the same images: each float64 [B]; `auc` [B, K] too, per class."""

    accuracy: Floats
    precision: Floats
    recall: Floats
    f1: Floats
    auc: Floats
    ece: Floats
    nll: Floats
    brier: Floats
    class_precision: Floats
    class_recall: Floats
    class_f1: Floats
    class_auc: Floats


class Scorer:
    """Scores fixed answers under any weighting of the images, many weightings at once.

    `classes` names the K columns of `probabilities`.
    """

    def __init__(self, probabilities: NDArray[np.floating], labels: Integers, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.probabilities = np.asarray(probabilities, np.float64)
        self.labels = labels
        images = len(self.probabilities)
        names = np.arange(len(self.classes))
        if images == 0:
            raise InvalidRequest("There is no image to evaluate on; choose a split that has images.")
        rows = np.arange(images)
        self.predicted: Integers = self.probabilities.argmax(axis=1)
        self.confidence = self.probabilities[rows, self.predicted]
        self.correct = self.predicted == labels
        self.is_label = labels[:, None] == names  # [N, K]
        self.is_predicted = self.predicted[:, None] == names  # [N, K]
        likelihood = np.maximum(self.probabilities[rows, labels], _SMALLEST_PROBABILITY)
        squared = ((self.probabilities - self.is_label) ** 2).sum(axis=1)
        # One matrix product gives the sums of all of these at once: [N, 3K + 2 + bins]
        gaps = np.zeros((images, CALIBRATION_BINS))
        gaps[rows, calibration_bin(self.confidence)] = self.correct - self.confidence
        hits = self.is_label & self.is_predicted
        self._columns = np.hstack(
            [hits, self.is_label, self.is_predicted, -np.log(likelihood)[:, None], squared[:, None], gaps]
        )
        self._orders = [_Order.of(self.probabilities[:, k]) for k in names]

    def score(self, weights: Floats) -> Scores:
        """The metrics under `weights` [B, N] ≥ 0; macro figures are means over the classes that have images
        under these weights: a class that a replicate did not draw is not one it got wrong."""
        classes = self.probabilities.shape[1]
        sums = weights @ self._columns
        total = weights.sum(axis=1)
        hits, support, called = (sums[:, i * classes : (i + 1) * classes] for i in range(3))
        precision, recall = _ratio(hits, called), _ratio(hits, support)
        f1 = _ratio(2 * hits, called + support)
        drawn = support > 0
        auc = np.stack([self._auc(k, weights) for k in range(classes)], axis=1)
        return Scores(
            accuracy=hits.sum(axis=1) / total,
            precision=_mean_of_defined(np.where(drawn, precision, np.nan)),
            recall=_mean_of_defined(np.where(drawn, recall, np.nan)),
            f1=_mean_of_defined(np.where(drawn, f1, np.nan)),
            auc=_mean_of_defined(auc),
            ece=np.abs(sums[:, 3 * classes + 2 :]).sum(axis=1) / total,
            nll=sums[:, 3 * classes] / total,
            brier=sums[:, 3 * classes + 1] / total,
            class_precision=precision,
            class_recall=recall,
            class_f1=f1,
            class_auc=auc,
        )

    def _auc(self, k: int, weights: Floats) -> Floats:
        """Area under the ROC curve of class `k` against the rest, [B]: the weighted share of pairs ranked rightly,
        ties counting half (Hanley & McNeil 1982). NaN where one side is empty."""
        order = self._orders[k]
        ranked = weights[:, order.index]
        positive = order.sums(ranked * self.is_label[order.index, k])  # [B, runs]
        negative = order.sums(ranked) - positive
        below = np.cumsum(negative, axis=1) - negative
        pairs = positive.sum(axis=1) * negative.sum(axis=1)
        return _ratio((positive * (below + negative / 2)).sum(axis=1), pairs, empty=np.nan)


@dataclass(frozen=True, slots=True)
class _Order:
    """The images in ascending order of one class's score, and where each run of equal scores begins."""

    index: Integers
    starts: Integers

    @classmethod
    def of(cls, scores: Floats) -> "_Order":
        index = np.argsort(scores, kind="stable")
        return cls(index, np.flatnonzero(np.diff(scores[index], prepend=-np.inf)))

    def sums(self, values: Floats) -> Floats:
        if len(self.starts) == len(self.index):
            return values  # no ties
        summed: Floats = np.add.reduceat(values, self.starts, axis=1)
        return summed


def _ratio(above: Floats, below: Floats, empty: float = 0.0) -> Floats:
    out: Floats = np.full(below.shape, empty)
    return np.divide(above, below, out=out, where=below > 0)


def _mean_of_defined(values: Floats) -> Floats:
    """Mean over the last axis of what is not NaN; NaN where nothing is."""
    defined = ~np.isnan(values)
    return _ratio(np.where(defined, values, 0.0).sum(axis=-1), defined.sum(axis=-1).astype(float), empty=np.nan)


def calibration_bin(confidence: Floats) -> Integers:
    """Which of the 15 equal-width bins (lower, upper] a confidence falls in: int64 [N]."""
    bins = np.ceil(confidence * CALIBRATION_BINS).astype(np.int64) - 1
    return np.clip(bins, 0, CALIBRATION_BINS - 1)


def estimates(scorer: Scorer, resampling: Resampling) -> dict[str, Estimate]:
    """Every metric that is defined on these images, with its 95 % interval.

    accuracy, precision, recall, f1 (macro), auc (macro one-versus-rest) and ece (expected calibration error of the
    top label, Naeini et al. 2015) are fractions; nll is in nats; brier is the sum over classes, in [0, 2]. Accuracy
    has the Wilson interval, or the cluster bootstrap's where images come in groups; the rest is bootstrapped. Where all
    replicates are equal, as without a mistake, the interval is Wilson's for as many images or groups as there are
    (macro figures: as the smallest class has). One group alone leaves every value possible.
    """
    point = scorer.score(np.ones((1, len(scorer.labels))))
    blocks = [scorer.score(weights) for weights in resampling.blocks()]
    found: dict[str, Estimate] = {}
    for name in METRICS:
        value = float(getattr(point, name)[0])
        if np.isnan(value):
            continue  # one class only: no ROC curve
        method: str = resampling.method
        replicates = np.concatenate([getattr(block, name) for block in blocks])
        if name == "accuracy" and resampling.clusters is None:
            (low, high), method = wilson(int(scorer.correct.sum()), len(scorer.labels)), "wilson"
        elif name == "ece":
            low, high = basic(value, replicates)
        else:
            low, high = percentile(replicates)
        largest = _LARGEST.get(name, 1.0)
        if resampling.clusters is not None and not resampling.clusters.any():
            low, high = 0.0, largest  # one group says nothing about how groups differ
        elif degenerate(low, high):
            size = _units(scorer, resampling, name)
            low, high = (largest * bound for bound in wilson(value / largest * size, size))
            method = "wilson" if resampling.clusters is None else "cluster-wilson"
        found[name] = Estimate(value=value, low=low, high=high, method=method)
    return found


def _units(scorer: Scorer, resampling: Resampling, name: str) -> int:
    """How many independent images or groups a metric rests on; a macro figure on no more than its smallest class."""
    if name not in _MACRO:
        return len(np.unique(resampling.units))
    return min(len(np.unique(resampling.units[scorer.labels == k])) for k in np.unique(scorer.labels))


def per_class(scorer: Scorer) -> list[ClassReport]:
    """Precision, recall, F1 and AUC of each class; a ratio without a denominator is 0, an undefined AUC None."""
    point = scorer.score(np.ones((1, len(scorer.labels))))
    support = scorer.is_label.sum(axis=0)
    return [
        ClassReport(
            label=label,
            support=int(support[k]),
            precision=float(point.class_precision[0, k]),
            recall=float(point.class_recall[0, k]),
            f1=float(point.class_f1[0, k]),
            auc=None if np.isnan(point.class_auc[0, k]) else float(point.class_auc[0, k]),
        )
        for k, label in enumerate(scorer.classes)
    ]


def confusion(scorer: Scorer) -> list[list[int]]:
    """`[i][j]` counts images of true class i that were called j."""
    counts: list[list[int]] = (scorer.is_label.astype(np.int64).T @ scorer.is_predicted.astype(np.int64)).tolist()
    return counts


def worst(scorer: Scorer, limit: int) -> Integers:
    """Positions of at most `limit` misclassified images, the most confidently wrong first."""
    wrong = np.flatnonzero(~scorer.correct)
    return wrong[np.argsort(-scorer.confidence[wrong], kind="stable")][:limit]


def roc(scorer: Scorer, k: int) -> tuple[Floats, Floats]:
    """False and true positive rate of class `k` against the rest, from (0, 0) to (1, 1), one point a score."""
    order = np.argsort(-scorer.probabilities[:, k], kind="stable")
    positive = scorer.is_label[order, k]
    last = np.flatnonzero(np.diff(scorer.probabilities[order, k], append=-np.inf))
    true = np.concatenate([[0], np.cumsum(positive)[last]]) / max(1, positive.sum())
    false = np.concatenate([[0], np.cumsum(~positive)[last]]) / max(1, (~positive).sum())
    return false, true


def reliability(scorer: Scorer) -> tuple[Floats, Floats, Integers]:
    """Mean confidence, accuracy and count of each calibration bin, [15] each; NaN in an empty bin."""
    member = calibration_bin(scorer.confidence)[:, None] == np.arange(CALIBRATION_BINS)  # [N, 15]
    count: Integers = member.sum(axis=0)
    size = count.astype(np.float64)
    confidence, accuracy = scorer.confidence @ member, scorer.correct.astype(np.float64) @ member
    return _ratio(confidence, size, np.nan), _ratio(accuracy, size, np.nan), count
