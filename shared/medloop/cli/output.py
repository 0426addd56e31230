"""What the command line prints: messages and progress on standard error, results on standard output."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from medloop.data.parallel import ProgressFn
from medloop.errors import InvalidDataset, MedLoopError

WRONG_USAGE = 2

console = Console(stderr=True, highlight=False)
# Into a pipe or a file, a table is not folded to a terminal's width.
results = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def run(app: typer.Typer) -> int:
    """Run the command line; returns its exit status, having said every error in one clear sentence."""
    # Read here rather than from the command: an error may come before its options were parsed.
    as_json = "--json" in sys.argv
    try:
        status = app(standalone_mode=False)
    except MedLoopError as error:
        show_error(error, as_json)
        return error.exit_status
    except typer.TyperException as error:
        console.print(Text(f"Error: {error} See medloop --help."))
        return WRONG_USAGE
    return status if isinstance(status, int) else 0


def show_error(error: MedLoopError, as_json: bool) -> None:
    if as_json:
        print_json({"error": {"code": error.code, "detail": error.detail, **error.extra}})
        return
    console.print(Text("Error: ", style="bold red").append(error.detail, style="default"))
    if isinstance(error, InvalidDataset) and error.issues:
        rows = [(issue.kind, issue.where, issue.detail) for issue in error.issues]
        console.print(table("What is wrong", ["kind", "where", "what"], rows))


def print_json(document: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(document, default=str) + "\n")
    sys.stdout.flush()


def show(document: Mapping[str, Any], as_json: bool, text: str | Table) -> None:
    """Print a command's result: the document for scripts, or the text for people."""
    if as_json:
        print_json(document)
    else:
        results.print(text)


def table(title: str, columns: list[str], rows: list[tuple[Any, ...]], limit: int = 40) -> Table:
    """A table of at most `limit` rows; how many more there are is said below it."""
    shown = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows[:limit]:
        shown.add_row(*(Text(str(cell)) for cell in row))
    if len(rows) > limit:
        shown.caption = f"and {len(rows) - limit} more (--json lists all)"
    return shown


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "", style="progress.data.speed")


@contextmanager
def progress_bars() -> Iterator[ProgressFn]:
    """One bar a step, with what is done, the rate and the time left; plain lines where there is no terminal."""
    if not console.is_terminal:
        yield _plain_progress()
        return
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(30),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, Any] = {}

        def update(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = progress.add_task(step, total=total or None)
            progress.update(tasks[step], completed=done, total=total or None)

        yield update


def _plain_progress() -> ProgressFn:
    tenths: dict[str, int] = {}

    def update(step: str, done: int, total: int) -> None:
        tenth = 10 * done // total if total else 0
        if tenth != tenths.get(step):
            tenths[step] = tenth
            console.print(f"{step}: {done:,} of {total:,}")

    return update


def user_name() -> str:
    """Who sits at this machine, as the default author of corrections and approvals."""
    return os.environ.get("USER") or os.environ.get("USERNAME") or "unknown"
