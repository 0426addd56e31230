"""Calibration error (15 bins) before and after temperature, of the runs whose scores are reported."""

from medloop_evaluator.metrics import Scorer

from benchmarks.training.averages import Average, over_images, without_temperature
from benchmarks.training.bench import Asked, Bench
from benchmarks.training.scores import Figures
from benchmarks.training.scoring import Study, available
from benchmarks.training.sets import CALIBRATED, SETS


def compare(bench: Bench, asked: Asked) -> Figures:
    figures: Figures = {}
    study = Study(bench, asked)
    for name in available(asked, CALIBRATED):
        records = study.records(name, asked.seeds or SETS[name].seeds)
        found = [study.answered(record) for record in records]
        before = [
            Scorer(without_temperature(answer.probabilities, record.temperature), answer.labels, answer.classes)
            for answer, record in zip(found, records, strict=True)
        ]
        groups = found[0].groups
        after = over_images([answer.scorer for answer in found], "ece", groups)
        figures |= _figures(f"{asked.prefix}ece.{name}", after)
        figures |= _figures(f"{asked.prefix}ece_before.{name}", over_images(before, "ece", groups))
    return figures


def _figures(place: str, found: Average) -> Figures:
    return {place: found.mean, f"{place}.low": found.low, f"{place}.high": found.high}
