"""With and without CutMix, otherwise equal: differences of pairs that share set and seed."""

from statistics import fmean

from benchmarks.training.averages import over_seeds
from benchmarks.training.bench import Asked, Bench, say
from benchmarks.training.runs import Record
from benchmarks.training.scores import METRICS, Figures
from benchmarks.training.scoring import Study, available
from benchmarks.training.sets import CUTMIX_SEEDS, SETS

NAMES = {"auc": "cutmix_gain", "accuracy": "cutmix_gain_accuracy"}


def compare(bench: Bench, asked: Asked) -> Figures:
    if "budget_minutes" in asked.options:
        say("CutMix is left out: a budget is measured for each run, so that pairs would differ in more than CutMix.")
        return {}
    figures: Figures = {}
    study, seeds = Study(bench, asked), asked.seeds or CUTMIX_SEEDS
    for name in available(asked, [name for name, found in SETS.items() if found.small]):
        mixed, plain = study.records(name, seeds), study.records(name, seeds, cutmix=False)
        for metric in METRICS:
            figures |= gains(_values(mixed, asked, metric), _values(plain, asked, metric), asked.prefix, metric, name)
    return figures


def gains(mixed: list[float], plain: list[float], prefix: str, metric: str, name: str) -> Figures:
    """`mixed` and `plain` are values of one metric, in the same order of seeds."""
    gain = over_seeds([a - b for a, b in zip(mixed, plain, strict=True)])
    place = f"{prefix}{NAMES[metric]}.{name}"
    figures: Figures = {
        place: gain.mean,
        f"{place}.with": fmean(mixed),
        f"{place}.without": fmean(plain),
        f"{place}.seeds": len(mixed),
    }
    return figures if gain.std is None else figures | {f"{place}.low": gain.low, f"{place}.high": gain.high}


def _values(records: list[Record], asked: Asked, metric: str) -> list[float]:
    return [getattr(record.scored[asked.split], metric).value for record in records]
