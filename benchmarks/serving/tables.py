"""Figures as tables for people: a row a server, a column a figure."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

COLUMNS = (
    "cpu_ms",
    "cpu_ratio",
    "bfloat16_ratio",
    "p50_ms",
    "p50_ratio",
    "p99_ms",
    "requests_per_second",
    "generator_cores",
)

WIDTH = 132
"""Characters: into a file or a pipe a table would otherwise be folded to 80."""


def show(figures: Mapping[str, float]) -> None:
    """Print every figure: those of (figure, load, server) side by side, the others one below another."""
    console = Console(width=WIDTH)
    loads = _loads(figures)
    rest = dict(figures)
    for load in loads:
        servers = list(dict.fromkeys(name.rpartition(".")[2] for name in figures if f".{load}." in name))
        table = Table(load, *COLUMNS, title_justify="left")
        for server in servers:
            table.add_row(server, *(_cell(rest.pop(f"{column}.{load}.{server}", None)) for column in COLUMNS))
        console.print(table)
    if rest:
        table = Table("figure", "value")
        for name, value in rest.items():
            table.add_row(name, _cell(value))
        console.print(table)


def _loads(figures: Mapping[str, float]) -> Sequence[str]:
    """Such as tiny64.c16, from cpu_ms.tiny64.c16.fastapi."""
    return list(dict.fromkeys(n.partition(".")[2].rpartition(".")[0] for n in figures if n.startswith("cpu_ms.")))


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.1e}"
