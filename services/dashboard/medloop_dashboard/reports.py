"""Evaluations and explanations as MLflow keeps them, and tables made from them."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from medloop.errors import InvalidRequest
from medloop.schemas import Estimate, EvaluationReport, ExplanationIndex
from pydantic import ValidationError

from medloop_dashboard.quality import METHOD_NAMES, QUALITY_NAMES
from medloop_dashboard.runs import ArtifactFile
from medloop_dashboard.wording import METRIC_NAMES, figure, interval, percent, share_with_interval, wilson

FOLDER = "evaluation"
EXPLANATIONS = "explanations"
EXPLANATION_INDEX = f"{EXPLANATIONS}/index.json"
BINS = 15  # equal width, as in the evaluator's calibration error


def evaluated_splits(files: Sequence[ArtifactFile]) -> list[str]:
    """The splits that a run has an evaluation of, test first."""
    paths = [file.path.split("/") for file in files]
    splits = {path[1] for path in paths if len(path) == 3 and path[0] == FOLDER and path[2] == "report.json"}
    return sorted(splits, key=lambda split: (split != "test", split))


def read_report(document: bytes) -> EvaluationReport:
    """Raises InvalidRequest for anything but a report."""
    try:
        return EvaluationReport.model_validate_json(document)
    except ValidationError as exc:
        raise InvalidRequest("The stored evaluation is not one that this release reads; evaluate again.") from exc


def read_explanations(document: bytes) -> ExplanationIndex:
    """Raises InvalidRequest for anything but an index of explanations."""
    try:
        return ExplanationIndex.model_validate_json(document)
    except ValidationError as exc:
        raise InvalidRequest("The stored explanations are not of this release; explain the version again.") from exc


def figure_table(figures: Mapping[str, Estimate]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "Metric": METRIC_NAMES.get(name, name),
                "Value": figure(name, estimate.value),
                "95 % interval": interval(name, estimate),
                "Method": estimate.method,
            }
            for name, estimate in figures.items()
        ]
    )


def served_notes(report: EvaluationReport) -> list[str]:
    """What the figures of prediction sets and referrals rest on, and what speaks against them (plain text)."""
    served = report.served
    if served is None:
        return ["Evaluated before prediction sets and referrals were counted: evaluate the version again."]
    nominal = percent(served.nominal_coverage, 0)
    sizes = ", ".join(f"{size}: {images}" for size, images in enumerate(served.set_sizes) if images)
    notes = [
        f"Coverage aimed at: {nominal}, by a threshold that {served.calibration_images} calibration images set. "
        f"Images by size of their set: {sizes}."
    ]
    if report.split == "calibration":
        notes.append("These images set the threshold themselves, so their coverage says nothing about new ones.")
    elif served.figures["coverage"].high < served.nominal_coverage:
        notes.append(
            f"The right class is in the set less often than {nominal}: these images are not like the calibration "
            "images, or those were few. Do not rely on the sets for images like these."
        )
    if "referred_unlike_training" not in served.figures:
        notes.append("This version has no outlier threshold, so no image is referred as unlike the training images.")
    return notes


def class_table(report: EvaluationReport) -> pd.DataFrame:
    """Figures by class; precision and recall with intervals, unless images come in groups (then they are not
    independent, and the interval would be too narrow), and how often the class is in the set of its images."""
    independent = not any(estimate.method.startswith("cluster-") for estimate in report.metrics.values())
    called = np.asarray(report.confusion, np.int64).sum(axis=0)
    return pd.DataFrame(
        [
            {
                "Class": row.label,
                "Images": row.support,
                "Precision": _share(report.confusion[k][k], int(called[k]), independent),
                "Recall": _share(report.confusion[k][k], row.support, independent),
                "F1": percent(row.f1),
                "AUC": "not defined" if row.auc is None else f"{row.auc:.4f}",
            }
            | _coverage(report, row.label)
            for k, row in enumerate(report.per_class)
        ]
    )


def _coverage(report: EvaluationReport, label: str) -> dict[str, str]:
    if report.served is None:
        return {}
    found = report.served.class_coverage.get(label)
    said = "not defined" if found is None else f"{percent(found.value)} ({percent(found.low)} to {percent(found.high)})"
    return {"In the set": said}


def _share(hits: int, total: int, independent: bool) -> str:
    if total == 0:
        return "not defined"
    return share_with_interval(hits, total) if independent else percent(hits / total)


def quality_table(index: ExplanationIndex) -> pd.DataFrame:
    """The mean quality figures of each method."""
    return pd.DataFrame(
        [
            {"Method": METHOD_NAMES.get(method, method)}
            | {QUALITY_NAMES.get(name, name): f"{value:.4f}".removesuffix(".0000") for name, value in figures.items()}
            for method, figures in index.quality.items()
        ]
    ).fillna("")


def mistake_pictures(files: Sequence[ArtifactFile], split: str) -> dict[int, str]:
    """Paths of the misclassified images' pictures by their place in `EvaluationReport.worst`."""
    prefix = f"{FOLDER}/{split}/misclassified/"
    names = {file.path: file.path.removeprefix(prefix) for file in files if file.path.startswith(prefix)}
    return {int(name[:2]): path for path, name in names.items() if name[:2].isdigit()}


def reliability_table(predictions: bytes) -> pd.DataFrame:
    """Columns `confidence`, `accuracy` with its interval `low` to `high`, and `images`, by confidence bin, from
    predictions.csv; empty bins are left out.

    Raises InvalidRequest when the file lacks what is needed.
    """
    try:
        # Class names such as "NA" or "007" are names.
        frame = pd.read_csv(io.BytesIO(predictions), dtype={"label": str, "predicted": str}, keep_default_na=False)
        correct = (frame["label"] == frame["predicted"]).to_numpy(np.float64)
        confidence = frame.filter(regex="^p_").to_numpy(np.float64).max(axis=1)
    except (ValueError, KeyError) as exc:
        raise InvalidRequest("predictions.csv is not one that this release reads; evaluate again.") from exc
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    table = pd.DataFrame({"bin": bins, "confidence": confidence, "accuracy": correct, "images": 1})
    found = table.groupby("bin").agg(
        confidence=("confidence", "mean"), accuracy=("accuracy", "mean"), images=("images", "sum")
    )
    ends = [wilson(share * images, images) for share, images in zip(found["accuracy"], found["images"], strict=True)]
    return found.assign(low=[low for low, _ in ends], high=[high for _, high in ends])
