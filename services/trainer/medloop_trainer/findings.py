"""What a search found: its trials as a table, and which dimensions mattered as a plot."""

import csv
import io
from collections.abc import Mapping, Sequence

from optuna.trial import FrozenTrial

from medloop_trainer.space import Space
from medloop_trainer.study import state_of

_FACTS = ("best_epoch", "val_accuracy", "val_auc", "retry_of", "run_id", "reason")
_WIDTH, _BAR = 6.4, 0.35  # inches: of the plot, and of the height that each bar takes


def trials_csv(trials: Sequence[FrozenTrial], space: Space) -> str:
    """A line a trial, oldest first: state, `judged_by` of its best epoch (of a pruned one: when it was left), seconds,
    its point and what else is known."""
    names = [dimension.name for dimension in space.dimensions]
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(["trial", "state", "judged_by", "epochs", "seconds", *names, *_FACTS])
    for trial in trials:
        seconds = "" if trial.duration is None else f"{trial.duration.total_seconds():.1f}"
        found: list[object] = [trial.number, state_of(trial), trial.value, trial.last_step, seconds]
        table.writerow(found + [trial.params.get(n) for n in names] + [trial.user_attrs.get(n) for n in _FACTS])
    return buffer.getvalue()


def importance_png(importance: Mapping[str, float], trials: int) -> bytes:
    """Bars, the most important dimension on top; `trials` is how many this rests on."""
    from matplotlib.figure import Figure  # without pyplot, which keeps global state and looks for a display

    figure = Figure(figsize=(_WIDTH, 1.2 + _BAR * len(importance)), dpi=100, layout="constrained")
    panel = figure.add_subplot()
    panel.barh([name.replace("_", " ") for name in importance], list(importance.values()))
    panel.invert_yaxis()
    panel.set(title=f"What the best of {trials} whole trials have in common", xlabel="share of importance (PED-ANOVA)")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
