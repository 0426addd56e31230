"""Progress for people: bars on standard error where that is a terminal, silence where it is not."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text


class Bars:
    """One line a step: what is done, how fast, how long it will still take."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, step: str, done: int, total: int) -> None:
        """A `ProgressFn`."""
        task = self._tasks.get(step)
        if task is None:
            task = self._tasks[step] = self._progress.add_task(step, total=total, note="")
        self._progress.update(task, completed=done, total=total)

    def note(self, step: str, text: str) -> None:
        """Say something at the end of a step's line."""
        if step in self._tasks:
            self._progress.update(self._tasks[step], note=text)

    @contextmanager
    def waiting(self, step: str) -> Iterator[None]:
        """A step of unknown length."""
        task = self._progress.add_task(step, total=None, note="")
        try:
            yield
        finally:
            self._progress.update(task, total=1, completed=1)


class CountColumn(ProgressColumn):
    """How many of how many, and how many a second over the whole step; empty where there is nothing to count."""

    def render(self, task: Task) -> Text:
        if task.total is None or task.total <= 1:
            return Text("")
        seconds = task.finished_time or task.elapsed
        rate = f"{task.completed / seconds:,.0f}/s" if seconds else ""
        return Text(f"{task.completed:,.0f}/{task.total:,.0f} {rate}")


@contextmanager
def bars(forced: bool | None = None) -> Iterator[Bars]:
    """Bars that end with the context. `forced` shows or hides them whatever standard error is."""
    console = Console(stderr=True, force_terminal=forced or None)
    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=10),  # all columns fit in 80
        CountColumn(Column(no_wrap=True)),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
    )
    hidden = forced is False or not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, redirect_stdout=False) as progress:
        yield Bars(progress)
