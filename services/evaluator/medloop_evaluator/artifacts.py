"""What an evaluation leaves in the version's MLflow run, under `evaluation/<split>/`.

    report.json              the EvaluationReport
    predictions.csv          one line an image: row, image_hash, label, predicted, p_<class> with all digits of float32
    misclassified.csv        the wrong ones of them, the most confidently wrong first
    misclassified/           pictures of the worst, as the network saw them: NN_<true>_as_<predicted>.png
    confusion_matrix.png  reliability.png  roc.png

Images are named by class and hash only: a file's name could tell who the patient is.
"""

import csv
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from medloop.data.manifest import Manifest
from medloop.registry import Registry, translated
from medloop.schemas import EvaluationReport
from medloop.vision.overlay import enlarge
from numpy.typing import NDArray

from medloop_evaluator.answers import Answers
from medloop_evaluator.metrics import Scorer, worst
from medloop_evaluator.plots import confusion_png, reliability_png, roc_png


def publish(
    registry: Registry,
    report: EvaluationReport,
    manifest: Manifest,
    answers: Answers,
    scorer: Scorer,
    images: NDArray[np.uint8],
) -> None:
    """Log files and metrics of `report` to its run; doing it again replaces the files. `images` is uint8
    [rows of the manifest, S, S, C]."""
    with tempfile.TemporaryDirectory(prefix="medloop-") as temporary:
        folder = Path(temporary)
        write_files(folder, report, manifest, answers, scorer, images)
        with translated(registry.tracking_uri, f"Run {report.model.run_id}"):
            registry.client.log_artifacts(report.model.run_id, str(folder), f"evaluation/{report.split}")
    _log_metrics(registry, report)


def write_files(
    folder: Path,
    report: EvaluationReport,
    manifest: Manifest,
    answers: Answers,
    scorer: Scorer,
    images: NDArray[np.uint8],
) -> None:
    """Write everything listed above into `folder`."""
    (folder / "report.json").write_text(report.model_dump_json(indent=1), encoding="utf-8")
    everything: NDArray[np.int64] = np.arange(len(answers.rows))
    _write_answers(folder / "predictions.csv", everything, manifest, answers, scorer)
    _write_answers(folder / "misclassified.csv", worst(scorer, len(answers.rows)), manifest, answers, scorer)
    (folder / "confusion_matrix.png").write_bytes(confusion_png(scorer))
    (folder / "reliability.png").write_bytes(reliability_png(scorer))
    (folder / "roc.png").write_bytes(roc_png(scorer))
    if report.worst:
        (folder / "misclassified").mkdir()
    for number, mistake in enumerate(report.worst):
        name = f"{number:02d}_{_slug(mistake.label)}_as_{_slug(mistake.predicted)}.png"
        (folder / "misclassified" / name).write_bytes(enlarge(images[mistake.row]))


def _write_answers(
    path: Path, positions: Iterable[np.int64], manifest: Manifest, answers: Answers, scorer: Scorer
) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["row", "image_hash", "label", "predicted", *(f"p_{label}" for label in scorer.classes)])
        for i in positions:
            row = int(answers.rows[i])
            predicted = scorer.classes[scorer.predicted[i]]
            # The shortest decimal that reads back as the same float32.
            probabilities = [str(p) for p in answers.probabilities[i]]
            table.writerow([row, manifest.rows[row].byte_hash, manifest.rows[row].label, predicted, *probabilities])


def _log_metrics(registry: Registry, report: EvaluationReport) -> None:
    """`test_accuracy`, `test_coverage` and so on, with the ends of the interval as `test_accuracy_low` and
    `test_accuracy_high`."""
    from mlflow.entities import Metric

    at = int(report.created_at.timestamp() * 1000)
    figures = report.metrics | (report.served.figures if report.served else {})
    metrics = [
        Metric(f"{report.split}_{name}{suffix}", value, at, 0)
        for name, figure in figures.items()
        for suffix, value in (("", figure.value), ("_low", figure.low), ("_high", figure.high))
    ]
    with translated(registry.tracking_uri, f"Run {report.model.run_id}"):
        registry.client.log_batch(report.model.run_id, metrics=metrics)


def _slug(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", label).strip("-.")[:60] or "class"
