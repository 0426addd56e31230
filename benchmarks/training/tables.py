"""Figures as tables for people, each with what it is to reach beside it."""

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.training.sets import SETS
from benchmarks.training.targets import TARGETS, verdict

WIDTH = 180
"""Characters: into a file or a pipe a table would otherwise be folded to 80."""
PREFIXES = {"": "test", "val.": "val"}
_METRICS = ("auc", "accuracy")

Figures = Mapping[str, float | str]


def show(figures: Figures, console: Console | None = None) -> None:
    """Print scores, what CutMix gains and calibration as a row a set, the other figures one below another."""
    console = console or Console(width=WIDTH)
    shown: set[str] = set()
    for prefix, split in PREFIXES.items():
        for stem, make in (("scores", _scores), ("cutmix_gain", _gains), ("ece", _ece)):
            own = [key for key in figures if key.startswith(prefix + stem) and key not in shown]
            shown |= set(own)
            if own:
                console.print(make(figures, prefix, split, _sets(figures, f"{prefix}{stem}.")))
    rest = {name: value for name, value in figures.items() if name not in shown}
    if rest:
        console.print(_list(rest))


def _sets(figures: Figures, start: str) -> list[str]:
    return [name for name in SETS if any(key == start + name or key.startswith(f"{start}{name}.") for key in figures)]


def _scores(figures: Figures, prefix: str, split: str, names: Sequence[str]) -> Table:
    heads = ("AUC", "target", "accuracy", "target", "images", "dropped", "seeds", "s a seed", "data set")
    table = Table(
        "set", *heads, title=f"Scores on {split}: mean ± std over seeds [95 % over images]", title_justify="left"
    )
    for name in names:
        place = f"{prefix}scores.{name}"
        cells = [cell for metric in _METRICS for cell in _score(figures, place, metric)]
        plain = (_plain(figures, f"{place}.{what}") for what in ("images", "dropped", "seeds"))
        slowest = f"{figures[f'{place}.seconds.max']:.0f}" if f"{place}.seconds.max" in figures else ""
        table.add_row(name, *cells, *plain, slowest, str(figures.get(f"{place}.dataset_id", ""))[:12])
        for other in SETS[name].published if split == "test" else ():
            table.add_row(f"  {other.by}", f"{other.auc:.3f}", "", f"{other.accuracy:.3f}")
    return table


def _score(figures: Figures, place: str, metric: str) -> tuple[str, str]:
    of = f"{place}.{metric}"
    std = f" ± {figures[f'{of}.std']:.4f}" if f"{of}.std" in figures else ""
    text = f"{figures[f'{of}.mean']:.4f}{std} {_interval(figures, of)}"
    return text, " ".join(verdict(f"{of}.mean", float(figures[f"{of}.mean"])))


def _gains(figures: Figures, prefix: str, split: str, names: Sequence[str]) -> Table:
    table = Table(
        "set",
        "metric",
        "with",
        "without",
        "gain [95 % over seeds]",
        "seeds",
        title=f"CutMix on {split}",
        title_justify="left",
    )
    for name in names:
        for metric, stem in (("AUC", "cutmix_gain"), ("accuracy", "cutmix_gain_accuracy")):
            place = f"{prefix}{stem}.{name}"
            means = (f"{figures[f'{place}.{which}']:.4f}" for which in ("with", "without"))
            gain = f"{figures[place]:+.4f} {_interval(figures, place)}"
            table.add_row(name, metric, *means, gain, _plain(figures, f"{place}.seeds"))
    return table


def _ece(figures: Figures, prefix: str, split: str, names: Sequence[str]) -> Table:
    title = f"Calibration error on {split}, 15 bins: mean over seeds [95 % over images]"
    table = Table("set", "before temperature", "after", "target", title=title, title_justify="left")
    for name in names:
        cells = (f"{figures[place]:.4f} {_interval(figures, place)}" for place in _both(prefix, name))
        table.add_row(name, *cells, " ".join(verdict(f"{prefix}ece.{name}", float(figures[f"{prefix}ece.{name}"]))))
    return table


def _both(prefix: str, name: str) -> Iterable[str]:
    return f"{prefix}ece_before.{name}", f"{prefix}ece.{name}"


def _interval(figures: Figures, place: str) -> str:
    if f"{place}.low" not in figures:
        return ""
    return f"[{figures[f'{place}.low']:.3f}, {figures[f'{place}.high']:.3f}]"


def _list(figures: Figures) -> Table:
    table = Table("figure", "value", "target", "")
    # What has a target comes first.
    for name in sorted(figures, key=lambda name: name not in TARGETS):
        value = figures[name]
        table.add_row(name, _number(value), *verdict(name, float(value)))
    return table


def _plain(figures: Figures, name: str) -> str:
    return _number(figures[name]) if name in figures else ""


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    if value == int(value):
        return f"{value:,.0f}"
    return f"{value:,.3f}" if abs(value) >= 0.01 else f"{value:.1e}"
