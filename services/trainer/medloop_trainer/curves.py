"""An epoch's numbers: as metrics, by name, and as curves."""

import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medloop_trainer.loop import Epoch

_PANELS = {
    "loss": ("train_loss", "val_loss"),
    "validation": ("val_accuracy", "val_auc"),
    "learning rate at the end": ("learning_rate",),
    "images/s": ("images_per_second",),
    "share of time waiting for input": ("input_wait_share",),
}
_LABELS = {"train_loss": "train (mixed, smoothed targets)", "val_loss": "val"}
_FROM_ZERO = {"images/s", "share of time waiting for input"}
"""Panels whose ups and downs would look large if the axis began at the least value."""
_COLUMNS = 3
_WIDTH, _HEIGHT = 4.0, 3.5  # inches, of one panel


def epoch_metrics(epoch: "Epoch") -> dict[str, float]:
    """Every number of an epoch under its field's name, those of the validation split as `val_…`; one that is None is
    left out, and the epoch's own number is the step."""
    numbers = asdict(epoch)
    val = numbers.pop("val")
    del numbers["number"]
    numbers |= {f"val_{name}": value for name, value in val.items()}
    return {name: float(value) for name, value in numbers.items() if isinstance(value, int | float)}


def curves_png(epochs: "Sequence[Epoch]") -> bytes:
    """Loss, validation scores, learning rate and speed by epoch: a panel for each that there are numbers of."""
    from matplotlib.figure import Figure  # without pyplot, which keeps global state and looks for a display
    from matplotlib.ticker import MaxNLocator

    points = [(epoch.number, epoch_metrics(epoch)) for epoch in epochs]
    known = {name for _, metrics in points for name in metrics}
    panels = {title: found for title, names in _PANELS.items() if (found := [n for n in names if n in known])}
    rows = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(_WIDTH * _COLUMNS, _HEIGHT * rows), dpi=100, layout="constrained")
    for place, (title, names) in enumerate(panels.items(), start=1):
        panel = figure.add_subplot(rows, _COLUMNS, place)
        for name in names:
            line = [(number, metrics[name]) for number, metrics in points if name in metrics]
            panel.plot(*zip(*line, strict=True), marker=".", label=_LABELS.get(name, name.removeprefix("val_")))
        panel.set(title=title, xlabel="epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        if title in _FROM_ZERO:
            panel.set_ylim(bottom=0)
        if len(names) > 1:
            panel.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
