"""Numbers, times and other people's words, as the pages show them."""

import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from medloop.schemas import Estimate, Outlier, Prediction

NOT_A_DEVICE = (
    "MedLoop is for research and workflow support. It is not a medical device: "
    "its answers must not be used to diagnose or treat anyone."
)

_MARKDOWN = re.compile(r"([!-/:-@\[-`{-~])")
"""Every ASCII punctuation mark: exactly what CommonMark lets a backslash take the meaning from."""


def plain(text: str) -> str:
    """Text from a person, a file or a service, made safe where Streamlit expects Markdown: shown as it was written.

    Without this a comment could hold links, or images that tell another server who reads it.
    """
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def percent(fraction: float, digits: int = 1) -> str:
    """0.9931 → "99.3 %". What rounds to 0 or 100 without being it is said to be below or above."""
    smallest = 10.0**-digits
    value = 100 * fraction
    if 0 < value < smallest / 2:
        return f"< {smallest:.{digits}f} %"
    if 100 - smallest / 2 < value < 100:
        return f"> {100 - smallest:.{digits}f} %"
    return f"{value:.{digits}f} %"


FRACTIONS = frozenset(
    {
        "accuracy",
        "precision",
        "recall",
        "f1",
        "coverage",
        "referred",
        "referred_ambiguous",
        "referred_unlike_training",
        "accepted_accuracy",
        "referred_accuracy",
    }
)
METRIC_NAMES = {
    "accuracy": "Accuracy",
    "precision": "Precision (macro)",
    "recall": "Recall (macro)",
    "f1": "F1 (macro)",
    "auc": "AUC (macro)",
    "ece": "Calibration error",
    "nll": "Negative log-likelihood",
    "brier": "Brier score",
    "coverage": "Right class in the prediction set",
    "set_size": "Classes in a set, mean",
    "referred": "Referred to a person",
    "referred_ambiguous": "… as ambiguous",
    "referred_unlike_training": "… as unlike the training images",
    "accepted_accuracy": "Accuracy of accepted answers",
    "referred_accuracy": "Accuracy of referred answers",
}


def figure(name: str, value: float) -> str:
    """A metric's value in its unit: shares of images in percent, the others as plain numbers."""
    return percent(value, 2) if name in FRACTIONS else f"{value:.4f}"


def interval(name: str, estimate: Estimate) -> str:
    return f"{figure(name, estimate.low)} to {figure(name, estimate.high)}"


def share_with_interval(hits: float, total: int) -> str:
    """A share of `total` ≥ 1 independent images in percent, with its 95 % interval."""
    low, high = wilson(hits, total)
    return f"{percent(hits / total)} ({percent(low)} to {percent(high)})"


def wilson(hits: float, total: int) -> tuple[float, float]:
    """The 95 % interval of a share of `total` ≥ 1 independent images (Wilson 1927)."""
    z = 1.959964  # the 97.5th percentile of the normal distribution
    share = hits / total
    middle = share + z**2 / (2 * total)
    reach = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    scale = 1 + z**2 / total
    # At the ends the formula gives 0 and 1, but floating point may miss them.
    return 0.0 if hits == 0 else (middle - reach) / scale, 1.0 if hits == total else (middle + reach) / scale


def logged(metrics: Mapping[str, float], split: str, name: str) -> str:
    """A metric that the evaluator logged to a run, with its 95 % interval."""
    key = f"{split}_{name}"
    if key not in metrics:
        return "not evaluated"
    ends = [metrics[end] for end in (f"{key}_low", f"{key}_high") if end in metrics]
    ends_said = f" ({figure(name, ends[0])} to {figure(name, ends[1])})" if len(ends) == 2 else ""
    return figure(name, metrics[key]) + ends_said


def moment(when: datetime) -> str:
    """To the minute, in UTC, and saying so."""
    return when.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def file_size(size: int) -> str:
    """1536 → "1.5 KiB"."""
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def short(digest: str) -> str:
    """Enough of a hash to tell it from its neighbours."""
    return digest[:12]


def listed(words: Sequence[str]) -> str:
    """["a", "b", "c"] → "a, b and c"."""
    return " and ".join(", ".join(words).rsplit(", ", 1))


def ruled_out(prediction: Prediction) -> str:
    """The prediction set in words (plain text)."""
    kept, all_classes = prediction.prediction_set, len(prediction.probabilities)
    coverage = percent(prediction.coverage, 0)
    if len(kept) == 1:
        return f"At {coverage} coverage every other class can be ruled out."
    if len(kept) == all_classes:
        return f"At {coverage} coverage no class can be ruled out: treat this answer as undecided."
    return f"At {coverage} coverage the model cannot rule out: {listed(kept)}."


def how_unlike(outlier: Outlier | None) -> str:
    """How far the image lies from the training images (plain text), and what is not known about that."""
    if outlier is None:
        return (
            "This model version keeps no record of how its training images look to it, "
            "so an image of another kind would not be noticed."
        )
    share = outlier.percentile / 100
    than = "all of them" if share == 1 else f"{percent(share, 0)} of them"
    said = f"The image lies further from the training images than {than}."
    if outlier.threshold is None:
        said += " Too few calibration images were there to say how far is too far, so none is referred for that."
    return said


def why_referred(prediction: Prediction) -> list[str]:
    """A sentence or two for each reason why a person should decide, and what to do about it (plain text)."""
    said = {
        "ambiguous": (
            f"The model cannot tell {listed(prediction.prediction_set)} apart on this image. "
            "Take the answer as undecided."
        ),
        "unlike-training": (
            "The image is unlike those that the model was trained on, so its probabilities may mean nothing here. "
            "Check that it is the right kind of image, complete and upright."
        ),
    }
    return [said[reason] for reason in prediction.reasons]


def timings(milliseconds: Mapping[str, float]) -> str:
    """{"decode": 1.2, "total": 9.9} → "9.9 ms (decode 1.2)"."""
    stages = [f"{name} {value:.1f}" for name, value in milliseconds.items() if name != "total"]
    total = milliseconds.get("total", sum(milliseconds.values()))
    return f"{total:.1f} ms" + (f" ({', '.join(stages)})" if stages else "")
