"""Progress for people: bars on standard error where that is a terminal, silence where it is not."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
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


class RateColumn(ProgressColumn):
    """Things a second, over the whole step."""

    def render(self, task: Task) -> Text:
        if task.total is None or not task.elapsed or not task.completed:
            return Text("")
        return Text(f"{task.completed / task.elapsed:,.0f}/s")


@contextmanager
def bars(forced: bool | None = None) -> Iterator[Bars]:
    """Bars that end with the context. `forced` shows or hides them whatever standard error is."""
    console = Console(stderr=True, force_terminal=forced or None)
    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        RateColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    hidden = forced is False or not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, redirect_stdout=False) as progress:
        yield Bars(progress)
