"""Charts (Vega-Lite through Altair), from plain values; text in them is drawn, never read as HTML."""

from collections.abc import Mapping, Sequence
from typing import Final, Literal

import altair as alt
import numpy as np
import pandas as pd

BLUE, PALE, GREY, INK = "#1f5f8b", "#f1f5f9", "#b9c4ce", "#1c2733"
PALETTE: Final = "tableau10"
Drawing = alt.Chart | alt.LayerChart | alt.FacetChart

_LABEL_PIXELS = 220  # of an axis label; longer class names end in an ellipsis, whole in the tooltip


def probabilities(values: Mapping[str, float], kept: Sequence[str]) -> Drawing:
    """Bars by class, likeliest first; classes of the prediction set in blue, those ruled out in grey."""
    order = sorted(values, key=lambda name: -values[name])
    frame = pd.DataFrame(
        {
            "class": order,
            "probability": [values[name] for name in order],
            "set": ["cannot be ruled out" if name in kept else "ruled out" for name in order],
        }
    )
    base = alt.Chart(frame).encode(
        y=alt.Y("class:N", sort=order, title=None, axis=alt.Axis(labelLimit=_LABEL_PIXELS)),
        x=alt.X("probability:Q", title="Probability", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%")),
        tooltip=[alt.Tooltip("class:N"), alt.Tooltip("probability:Q", format=".4%"), alt.Tooltip("set:N")],
    )
    bars = base.mark_bar().encode(
        color=alt.Color(
            "set:N",
            title=None,
            scale=alt.Scale(domain=["cannot be ruled out", "ruled out"], range=[BLUE, GREY]),
            legend=alt.Legend(orient="bottom"),
        )
    )
    # A bar of nearly full length leaves no room to its right: its figure stands inside.
    places: list[tuple[str, Literal["left", "right"], int, str]] = [
        ("datum.probability < 0.85", "left", 4, INK),
        ("datum.probability >= 0.85", "right", -6, "white"),
    ]
    figures = [
        base.transform_filter(condition)
        .mark_text(align=align, dx=dx, color=colour)
        .encode(text=alt.Text("probability:Q", format=".1%"))
        for condition, align, dx, colour in places
    ]
    return alt.layer(bars, *figures).properties(height=120 + 30 * len(order))


def curves(frame: pd.DataFrame, title: str) -> Drawing:
    """Lines over epochs from columns `epoch`, `value`, `metric`."""
    chart: Drawing = (
        alt.Chart(frame)
        .mark_line(point=True)
        .encode(
            x=alt.X("epoch:Q", title="Epoch", axis=alt.Axis(tickMinStep=1, format="d")),
            y=alt.Y("value:Q", title=title, scale=alt.Scale(zero=False)),
            color=alt.Color(
                "metric:N", title=None, scale=alt.Scale(scheme=PALETTE), legend=alt.Legend(orient="bottom")
            ),
            tooltip=["metric:N", "epoch:Q", alt.Tooltip("value:Q", format=".4f")],
        )
        .properties(height=300)
    )
    return chart


def confusion(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> Drawing:
    """Counts of true class (row) called as (column); the shade is the share of the row."""
    table = np.asarray(counts, np.int64)
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    frame = pd.DataFrame(
        [
            {"true": true, "called": called, "images": int(table[i, j]), "share": float(shares[i, j])}
            for i, true in enumerate(classes)
            for j, called in enumerate(classes)
        ]
    )
    names = list(classes)
    across = alt.Axis(labelAngle=-40, labelOverlap=False, labelLimit=_LABEL_PIXELS)
    base = alt.Chart(frame).encode(
        x=alt.X("called:N", sort=names, title="Called", axis=across),
        y=alt.Y("true:N", sort=names, title="True class", axis=alt.Axis(labelLimit=_LABEL_PIXELS)),
        tooltip=["true:N", "called:N", "images:Q", alt.Tooltip("share:Q", format=".1%", title="share of true class")],
    )
    squares = base.mark_rect().encode(
        color=alt.Color("share:Q", scale=alt.Scale(range=[PALE, BLUE], domain=[0, 1]), legend=None)
    )
    numbers = base.mark_text().encode(
        text="images:Q", color=alt.condition("datum.share > 0.55", alt.value("white"), alt.value(INK))
    )
    return alt.layer(squares, numbers).properties(height=200 + 40 * len(names))


def reliability(frame: pd.DataFrame) -> Drawing:
    """Accuracy against confidence, from columns `confidence`, `accuracy`, `low`, `high`, `images`."""
    scale = alt.Scale(domain=[0, 1])
    diagonal = (
        alt.Chart(pd.DataFrame({"confidence": [0.0, 1.0], "accuracy": [0.0, 1.0]}))
        .mark_line(strokeDash=[4, 4], color="#7a8793")
        .encode(x="confidence:Q", y="accuracy:Q")
    )
    points = (
        alt.Chart(frame)
        .mark_circle(color=BLUE, opacity=0.85)
        .encode(
            x=alt.X("confidence:Q", title="Mean confidence", scale=scale, axis=alt.Axis(format="%")),
            y=alt.Y("accuracy:Q", title="Accuracy", scale=scale, axis=alt.Axis(format="%")),
            size=alt.Size("images:Q", scale=alt.Scale(range=[40, 500]), legend=None),
            tooltip=[
                alt.Tooltip("confidence:Q", format=".1%"),
                alt.Tooltip("accuracy:Q", format=".1%"),
                "images:Q",
            ],
        )
    )
    intervals = (
        alt.Chart(frame).mark_rule(color=BLUE, opacity=0.6).encode(x="confidence:Q", y="low:Q", y2=alt.Y2("high:Q"))
    )
    return alt.layer(diagonal, intervals, points).properties(height=320)


def scatter(frame: pd.DataFrame, axes: tuple[str, str]) -> Drawing:
    """Points from columns `x`, `y`, `class`; `axes` are the axis titles."""
    chart: Drawing = (
        alt.Chart(frame)
        .mark_circle(size=22, opacity=0.6)
        .encode(
            x=alt.X("x:Q", title=axes[0]),
            y=alt.Y("y:Q", title=axes[1]),
            color=alt.Color("class:N", title=None, scale=alt.Scale(scheme=PALETTE), legend=alt.Legend(orient="right")),
            tooltip=["class:N"],
        )
        .properties(height=380)
    )
    return chart


def class_counts(frame: pd.DataFrame, splits: Sequence[str]) -> Drawing:
    """Stacked bars of images by class and split, from columns `class`, `split`, `images`."""
    order = list(splits)
    chart: Drawing = (
        alt.Chart(frame)
        .transform_calculate(place=f"indexof({order!r}, datum.split)")
        .mark_bar()
        .encode(
            y=alt.Y("class:N", title=None, axis=alt.Axis(labelLimit=_LABEL_PIXELS)),
            x=alt.X("sum(images):Q", title="Images"),
            color=alt.Color(
                "split:N", sort=order, title=None, scale=alt.Scale(scheme=PALETTE), legend=alt.Legend(orient="bottom")
            ),
            order=alt.Order("place:Q"),
            tooltip=["class:N", "split:N", "images:Q"],
        )
        .properties(height=140 + 30 * frame["class"].nunique())
    )
    return chart
