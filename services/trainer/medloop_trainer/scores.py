"""What is watched while training: loss, accuracy and area under the curve on the validation split."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Scores:
    """`loss` is the mean negative log-likelihood in nats; `auc` is None where it is not defined."""

    loss: float
    accuracy: float
    auc: float | None


def score(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> Scores:
    """Scores of `logits` [N, K] against `labels` [N], N ≥ 1."""
    log_probabilities = log_softmax(logits)
    loss = -log_probabilities[np.arange(len(labels)), labels].mean()
    accuracy = (logits.argmax(axis=1) == labels).mean()
    return Scores(float(loss), float(accuracy), macro_auc(log_probabilities, labels))


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def macro_auc(scores: NDArray[np.floating], labels: NDArray[np.int64]) -> float | None:
    """Mean over classes of the one-versus-rest area under the ROC curve, by ranks (Mann & Whitney 1947).

    Classes without images, or without others beside them, are left out; None when that leaves none.
    """
    areas = []
    for k in range(scores.shape[1]):
        positive = labels == k
        n, m = int(positive.sum()), int((~positive).sum())
        if n and m:
            ranks = _average_ranks(scores[:, k])
            areas.append((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))
    return float(np.mean(areas)) if areas else None


def _average_ranks(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return np.asarray((last - (counts - 1) / 2)[inverse])
