"""Scores of one recipe on all sets: mean and spread over seeds, intervals over images."""

from benchmarks.training.averages import over_images
from benchmarks.training.bench import Asked, Bench, say
from benchmarks.training.runs import Record
from benchmarks.training.scoring import Study, available
from benchmarks.training.sets import SETS

METRICS = ("auc", "accuracy")
Figures = dict[str, float | str]


def compare(bench: Bench, asked: Asked) -> Figures:
    figures: Figures = {}
    study = Study(bench, asked)
    for name in available(asked, list(SETS)):
        records = study.records(name, asked.seeds or SETS[name].seeds)
        place = f"{asked.prefix}scores.{name}"
        figures |= _averages(study, records, place) | _single(asked, records, place) | _circumstances(records, place)
    commits = {str(value) for key, value in figures.items() if key.endswith(".git_commit")}
    if len(commits) > 1:
        say(f"These runs were trained by different versions of the trainer ({', '.join(sorted(commits))}).")
    return figures


def _averages(study: Study, records: list[Record], place: str) -> Figures:
    answers = [study.answered(record) for record in records]
    figures: Figures = {}
    for metric in METRICS:
        found = over_images([answer.scorer for answer in answers], metric, answers[0].groups)
        figures |= {f"{place}.{metric}.{of}": getattr(found, of) for of in ("mean", "low", "high")}
        if found.std is not None:
            figures[f"{place}.{metric}.std"] = found.std
    return figures


def _single(asked: Asked, records: list[Record], place: str) -> Figures:
    """Each seed's own score and interval."""
    figures: Figures = {}
    for record in records:
        for metric in METRICS:
            found = getattr(record.scored[asked.split], metric)
            seed = f"{place}.seed{record.seed}.{metric}"
            figures |= {seed: found.value, f"{seed}.low": found.low, f"{seed}.high": found.high}
    figures[f"{place}.images"] = records[0].scored[asked.split].images
    figures[f"{place}.dropped"] = max(record.scored[asked.split].dropped for record in records)
    return figures


def _circumstances(records: list[Record], place: str) -> Figures:
    figures: Figures = {
        f"{place}.seeds": len(records),
        f"{place}.dataset_id": ",".join(sorted({record.dataset_id for record in records})),
        f"{place}.git_commit": ",".join(sorted({record.git_commit or "unknown" for record in records})),
    }
    # What a process that went on with another's work took says nothing of a whole training.
    whole = [record.seconds for record in records if not record.resumed]
    if whole:
        figures[f"{place}.seconds.max"] = max(whole)
    return figures
