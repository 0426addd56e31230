"""Figures as tables for people, in Markdown, as they stand in docs/scaling.md."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.scaling.assumptions import GIB, Times
from benchmarks.scaling.autoscaler import Rules
from benchmarks.scaling.measured import Network
from benchmarks.scaling.plan import Need, Plan, Site
from benchmarks.scaling.sizes import Sizes
from benchmarks.scaling.stories import Told

WIDTH = 160
SHOWN = 0.5
"""The share of what there is from which on a need is shown, beside the first."""
_CONSOLE = Console(width=WIDTH, highlight=False)


def show_settings(site: Site, times: Times) -> None:
    """What was read from the manifests."""
    given, pod = site.autoscaler, site.pod
    metrics = ", ".join(
        f"{metric.kind} {metric.target:.0%}" if metric.kind == "cpu" else f"{metric.kind} {metric.target:g} s"
        for metric in given.metrics
    )
    _CONSOLE.print(
        f"Autoscaler: {given.minimum} to {given.maximum} pods; {metrics}; up {_rules(given.up)}; "
        f"down {_rules(given.down)}.\nPod: {pod.cpu:g} CPU requested, {pod.cpu_limit:g} at most, "
        f"{pod.memory / GIB:g} GiB.\n"
        f"Queues: read every {times.custom_metrics:g} s, the largest of {times.custom_window:g} s counts.\n"
    )


def _rules(rules: Rules) -> str:
    policies = ", ".join(f"{each.value} {each.type} in {each.period:g} s" for each in rules.policies)
    return f"({policies}; {rules.select} of them, window {rules.window:g} s)"


def show_predictions(networks: Iterable[Network], sizes: Mapping[str, Sizes]) -> None:
    rows = [
        (
            network.name,
            f"{network.together * 1000:,.3f}",
            f"{sizes[network.name].image:,.0f}",
            f"{sizes[network.name].answer:,}",
            f"{sizes[network.name].document:,}",
            f"{sizes[network.name].embedding:,}",
            f"{sizes[network.name].spooled:,}",
        )
        for network in networks
    ]
    headings = ("network", "CPU ms", "image", "answer", "record", "of it embedding", "in the spool")
    _show("One prediction (bytes)", headings, rows)


def show_plans(plans: Iterable[Plan]) -> None:
    rows = [
        (
            plan.network,
            f"{plan.rate:,.0f}",
            f"{plan.cores:,.1f}" if plan.cores >= 0.1 else f"{plan.cores:.3f}",
            f"{plan.pods:,}",
            f"{plan.nodes:,} {plan.node.name}",
            *(f"{value:,.0f}" for value in (plan.fixed, plan.compute, plan.balancer, plan.records)),
            f"{plan.total:,.0f}",
            f"{plan.puts:,.0f}",
        )
        for plan in plans
    ]
    headings = (
        "network",
        "a second",
        "cores",
        "pods",
        "nodes",
        "fixed",
        "nodes $",
        "LCUs",
        "records",
        "together",
        "images",
    )
    _show("Steady load ($ a month)", headings, rows)


def show_needs(plans: Iterable[Plan], storing: Mapping[tuple[str, float], Sequence[Need]]) -> None:
    """What is needed to more than half of what there is, the most first; what storing images adds comes last."""
    rows = []
    for plan in plans:
        needs = [need for need in plan.needs if need.share > SHOWN]
        needs.sort(key=lambda need: -need.share)
        stored = [replace(need, what=f"{need.what} (only where all are)") for need in storing[plan.network, plan.rate]]
        for need in [*(needs or [plan.first]), *(need for need in stored if need.share > SHOWN)]:
            figures = (f"{_number(need.needed)} {need.unit}", f"{_number(need.there)} {need.unit}", f"{need.share:.0%}")
            rows.append((plan.network, f"{plan.rate:,.0f}", need.what, *figures, need.remedy))
    _show("What gives way first", ("network", "a second", "what", "needed", "there", "share", "then"), rows)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def show_stories(told: Mapping[tuple[str, float, str], Told]) -> None:
    rows = []
    for (network, rate, story), each in told.items():
        rows.append(
            (
                network,
                f"{rate:,.0f}",
                story,
                f"{each.in_target:.2%}",
                f"{each.refused:.2%}",
                "not in time" if math.isinf(each.recovered_s) else f"{each.recovered_s:.0f}",
                f"{each.pods:,}",
                f"{each.peak_pods:,}",
                f"{each.most_pods:,}",
                f"{each.peak_nodes:,}",
                f"{each.dollars:,.2f}",
            )
        )
    asked = ("network", "a second", "story", "in target", "refused", "good again, s")
    taken = ("pods", "peak", "max", "nodes", "$ an hour")
    _show("Bursts against the autoscaler", (*asked, *taken), rows)


def _show(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(box=box.MARKDOWN, title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, overflow="fold", no_wrap=True, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    _CONSOLE.print(table)
    _CONSOLE.print()
