"""`python -m medloop_trainer train`: train a network on a stored data set version and register it."""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Never

import typer
from medloop.errors import MedLoopError
from medloop.log import configure_logging

from medloop_trainer.progress import bars
from medloop_trainer.recipe import Options
from medloop_trainer.train import TrainerSettings
from medloop_trainer.train import train as run_training

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def trainer() -> None:
    """MedLoop's trainer."""


@app.command()
def train(
    dataset_id: Annotated[str, typer.Option(help="The data set version: 64 hex digits.")],
    model: Annotated[str, typer.Option(help="The model to add a version to: the name of the data set's lineage.")],
    architecture: Annotated[str, typer.Option(help="auto chooses by size.")] = "auto",
    size: Annotated[int | None, typer.Option(help="Side of the prepared images in px; 64 or less by itself.")] = None,
    epochs: Annotated[int | None, typer.Option(help="By itself: from the number of training images.")] = None,
    batch_size: int = 64,
    learning_rate: Annotated[
        float | None, typer.Option(help="The peak; by itself: 0.003, or 0.0003 pretrained.")
    ] = None,
    weight_decay: float = 0.05,
    label_smoothing: float = 0.05,
    cutmix_alpha: float = 1.0,
    cutmix_probability: float = 0.5,
    horizontal_flip: Annotated[bool, typer.Option(help="Mirror images: not where left and right differ.")] = False,
    pretrained: Annotated[str, typer.Option(help="auto, none, or a file of weights.")] = "auto",
    seed: int = 0,
    result: Annotated[Path | None, typer.Option(help="Also write the result there, as JSON.")] = None,
    progress: Annotated[bool | None, typer.Option(help="Show bars; by itself: on a terminal.")] = None,
) -> None:
    """Train, export, log and register; the last line on standard output is the result as one JSON object."""
    options = {name: value for name, value in locals().items() if name in Options.model_fields}
    try:
        with bars(progress) as shown:
            done = run_training(TrainerSettings(), dataset_id, model, Options.checked(**options), shown)
    except MedLoopError as exc:
        typer.echo(exc.detail, err=True)
        for issue in exc.extra.get("issues", ()):
            typer.echo(f"  {issue['where']}: {issue['detail']}", err=True)
        raise typer.Exit(exc.exit_status) from exc
    document = done.model_dump_json()
    if result is not None:
        result.write_text(document + "\n")
    typer.echo(document)


def _stopped(signum: int, _frame: object) -> Never:
    # As an exception, so that the run is marked as stopped on the way out.
    raise SystemExit(128 + signum)


def main() -> None:
    signal.signal(signal.SIGTERM, _stopped)
    # Threads that wait for each other sleep instead of spinning, which beside other processes trains twice as fast.
    # Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    configure_logging("trainer", "INFO" if not sys.stderr.isatty() else "WARNING")
    app()


if __name__ == "__main__":
    main()
