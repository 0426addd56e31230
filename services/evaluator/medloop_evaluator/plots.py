"""Figures of an evaluation as PNG, drawn without a display and without matplotlib's global state."""

import io
from typing import TYPE_CHECKING

import numpy as np

from medloop_evaluator.metrics import CALIBRATION_BINS, Scorer, confusion, reliability, roc

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 120
_MOST_ANNOTATED = 20  # classes: with more, numbers in the cells would overlap
_MOST_CURVES = 10  # matplotlib's default cycle has ten colours


def confusion_png(scorer: Scorer) -> bytes:
    """The confusion matrix: counts, coloured by the share of the true class."""
    counts = np.array(confusion(scorer))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [_plain(label) for label in scorer.classes]
    side = max(4.5, 0.55 * len(names) + 2.5)
    figure, axes = _figure(side, side * 0.9)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", fraction=0.046)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="true")
    if len(names) <= _MOST_ANNOTATED:
        for (i, j), count in np.ndenumerate(counts):
            axes.text(j, i, str(count), ha="center", va="center", color="white" if shares[i, j] > 0.5 else "black")
    return _png(figure)


def reliability_png(scorer: Scorer) -> bytes:
    """The reliability diagram (Niculescu-Mizil & Caruana 2005) of the top label, and how many images each bin has."""
    confidence, accuracy, count = reliability(scorer)
    filled = count > 0
    centres = (np.arange(CALIBRATION_BINS) + 0.5) / CALIBRATION_BINS
    figure, axes = _figure(5, 5)
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", label="calibrated")
    axes.plot(confidence[filled], accuracy[filled], marker="o", label="observed")
    axes.set(
        xlabel="mean probability of the predicted class", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.02)
    )
    images = axes.twinx()
    images.bar(centres, count, width=0.9 / CALIBRATION_BINS, color="tab:blue", alpha=0.2)
    images.set_ylabel("images")
    axes.legend(loc="upper left")
    return _png(figure)


def roc_png(scorer: Scorer) -> bytes:
    """ROC curves, one class against the rest; of the ten classes with most images where there are more."""
    figure, axes = _figure(5.5, 5)
    support = scorer.is_label.sum(axis=0)
    for k in np.argsort(-support, kind="stable")[:_MOST_CURVES]:
        if 0 < support[k] < len(scorer.labels):
            axes.plot(*roc(scorer, int(k)), label=_plain(scorer.classes[k]), drawstyle="steps-post")
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", label="by chance")
    axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(-0.01, 1), ylim=(0, 1.01))
    axes.legend(loc="lower right", fontsize="small")
    return _png(figure)


def _plain(label: str) -> str:
    return label.replace("$", r"\$")  # a class name is no formula


def _figure(width: float, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure  # half a second: not while the service starts

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    # No software name and no date inside: the same figures give the same file.
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()
