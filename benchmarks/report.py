"""What every benchmark prints: a table for people, and a flat JSON object with machine, versions and date."""

import argparse
import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

PACKAGES = ("numpy", "onnxruntime", "torch", "torchvision", "mlflow-skinny", "pillow")


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    return parser


def publish(title: str, figures: Mapping[str, float], file: Path | None) -> None:
    """Print `figures` and, where asked for, write them to `file`."""
    table = Table("figure", "value", title=title, title_justify="left")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.3f}")
    Console().print(table)
    save(figures, file)


def save(figures: Mapping[str, float | str], file: Path | None) -> None:
    """Write `figures` to `file` where one is given."""
    if file is not None:
        file.write_text(json.dumps({**figures, **surroundings()}, indent=1) + "\n")


def surroundings() -> dict[str, str | int]:
    """The machine, the versions and the date, without which a figure says nothing."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {_processor()}",
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        "python": platform.python_version(),
        **{f"version.{name}": version(name) for name in PACKAGES},
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return platform.processor()
    lines = (line.partition(":") for line in information.read_text().splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == "model name"), "unknown")
