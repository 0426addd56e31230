"""`python -m medloop_trainer train|retrain|search|reproduce`: train a network on a stored data set version and register
it, look for the options to train it with, or train again as a run did."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from medloop.errors import InvalidRequest, MedLoopError, UntrustedModel
from medloop.log import configure_logging

from medloop_trainer import flags
from medloop_trainer.begun import begun_run
from medloop_trainer.environment import by_torchrun
from medloop_trainer.progress import Bars, bars
from medloop_trainer.publish import TrainingResult
from medloop_trainer.recipe import Options, Preset
from medloop_trainer.reproduce import Reproduction
from medloop_trainer.reproduce import reproduce as run_reproduction
from medloop_trainer.retrain import learnt_already
from medloop_trainer.retrain import retrain as run_retraining
from medloop_trainer.search import Plan, SearchResult
from medloop_trainer.search import search as run_search
from medloop_trainer.settings import TrainerSettings, read_trainer_settings
from medloop_trainer.stop import Stop
from medloop_trainer.train import resume as resume_training
from medloop_trainer.train import train as run_training

app = typer.Typer(add_completion=False, no_args_is_help=True)
stop = Stop()


def _options(values: dict[str, Any]) -> dict[str, object]:
    """Those of a command's values that were given, and are options of a training."""
    return {name: value for name, value in values.items() if name in Options.model_fields and value is not None}


@app.callback()
def trainer() -> None:
    """MedLoop's trainer."""


@app.command()
def train(
    model: Annotated[str, typer.Option(help="The model to add a version to: the name of the data set's lineage.")],
    dataset_id: Annotated[str | None, typer.Option(help="The data set version: 64 hex digits.")] = None,
    resume: flags.Resume = None,
    preset: Annotated[Preset | None, typer.Option(help="How many images are shown; by itself: standard.")] = None,
    budget_minutes: flags.BudgetMinutes = None,
    architecture: flags.Architecture = None,
    size: flags.Size = None,
    epochs: flags.Epochs = None,
    batch_size: flags.BatchSize = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="The peak; by itself: 0.003, or 0.0003 pretrained.")
    ] = None,
    warm_up: flags.WarmUp = None,
    weight_decay: float | None = None,
    ema_decay: flags.EmaDecay = None,
    patience: flags.Patience = None,
    label_smoothing: float | None = None,
    sampling: flags.SamplingName = None,
    logit_adjustment: float | None = None,
    correction_weight: Annotated[
        int | None, typer.Option(help="How many times as often corrected images are shown; by itself: 1.")
    ] = None,
    modality: flags.ModalityName = None,
    horizontal_flip: flags.HorizontalFlip = None,
    erase_probability: float | None = None,
    cutmix_alpha: float | None = None,
    cutmix_probability: float | None = None,
    mixup_alpha: float | None = None,
    mixup_probability: float | None = None,
    whole_share: flags.WholeShare = None,
    pretrained: flags.Pretrained = None,
    seed: int | None = None,
    result: flags.Result = None,
    progress: flags.Progress = None,
) -> None:
    """Train, export, log and register; the last line on standard output is the result as one JSON object."""
    given = _options(locals())
    with _errors_told():
        done = _run(run_training, model, dataset_id, resume, given, progress)
    _answer(done, result)


@app.command()
def retrain(
    model: Annotated[str, typer.Option(help="The model whose champion goes on learning.")],
    dataset_id: Annotated[str | None, typer.Option(help="The new version of its data set: 64 hex digits.")] = None,
    if_new: Annotated[
        bool, typer.Option("--if-new", help="Train nothing, and print nothing, where a version learnt from it already.")
    ] = False,
    resume: flags.Resume = None,
    correction_weight: Annotated[
        int | None, typer.Option(help="How many times as often corrected images are shown; by itself: 4.")
    ] = None,
    preset: Annotated[Preset | None, typer.Option(help="A third of the epochs that `train` makes of it.")] = None,
    budget_minutes: flags.BudgetMinutes = None,
    epochs: flags.Epochs = None,
    batch_size: flags.BatchSize = None,
    learning_rate: Annotated[float | None, typer.Option(help="The peak; by itself: 0.0003 or less.")] = None,
    warm_up: flags.WarmUp = None,
    weight_decay: float | None = None,
    ema_decay: flags.EmaDecay = None,
    patience: flags.Patience = None,
    label_smoothing: float | None = None,
    sampling: flags.SamplingName = None,
    logit_adjustment: float | None = None,
    modality: flags.ModalityName = None,
    horizontal_flip: flags.HorizontalFlip = None,
    erase_probability: float | None = None,
    cutmix_alpha: float | None = None,
    cutmix_probability: float | None = None,
    mixup_alpha: float | None = None,
    mixup_probability: float | None = None,
    whole_share: flags.WholeShare = None,
    seed: int | None = None,
    result: flags.Result = None,
    progress: flags.Progress = None,
) -> None:
    """Train the champion further, by its own preparation and architecture; otherwise as `train`."""
    given = _options(locals())
    with _errors_told():
        done = _run(_retrain_if_new if if_new else run_retraining, model, dataset_id, resume, given, progress)
    _answer(done, result)


def _retrain_if_new(
    settings: TrainerSettings, dataset_id: str, model: str, options: Options, shown: Bars, stop: Stop
) -> TrainingResult | None:
    # Asked here, where no run is left to go on with: one that was lost while it registered has to come to its end.
    version = learnt_already(settings, model, dataset_id)
    if version is None:
        return run_retraining(settings, dataset_id, model, options, shown, stop)
    typer.echo(f"Nothing to learn: {model} version {version} learnt from this very data set version.", err=True)
    return None


def _run(
    begin: Callable[[TrainerSettings, str, str, Options, Bars, Stop], TrainingResult | None],
    model: str,
    dataset_id: str | None,
    resume: str | None,
    given: dict[str, object],
    progress: bool | None,
) -> TrainingResult | None:
    settings = read_trainer_settings()
    if resume is not None and given:
        option = "--" + next(iter(given)).replace("_", "-")
        raise InvalidRequest(f"{option} cannot be changed in a run that goes on; leave it out, or train anew.")
    with _leading(settings, model, dataset_id) as begun, bars(progress) as shown:
        if (run_id := resume or begun) is not None:
            return resume_training(settings, run_id, model, shown, stop, dataset_id)
        if dataset_id is None:
            raise InvalidRequest("Name what to train on with --dataset-id, or a run to go on with by --resume.")
        return begin(settings, dataset_id, model, Options.checked(**given), shown, stop)


@contextmanager
def _leading(
    settings: TrainerSettings, model: str | None = None, dataset_id: str | None = None
) -> Iterator[str | None]:
    """For a process alone, and for the first of those that torchrun started; it is told the run of `model` that they
    began, on that data set version, before they were started anew. Another one follows it instead, and ends."""

    def begun() -> str | None:
        return None if model is None else begun_run(settings, model, dataset_id)

    if not by_torchrun():
        yield begun()
        return
    # Not at the top: importing torch takes seconds, which a process alone fills with decoding.
    from medloop_trainer.distributed import follow, joined

    with joined() as ranks:
        if not ranks.leads:
            follow(settings, ranks, stop)
            raise typer.Exit
        yield begun()


@app.command()
def search(
    model: Annotated[str, typer.Option(help="The model to search for: the name of the data set's lineage.")],
    dataset_id: Annotated[str, typer.Option(help="The data set version: 64 hex digits.")],
    trials: Annotated[int, typer.Option(help="How many the study is to have, all processes' together.", min=1)] = 30,
    minutes: Annotated[float | None, typer.Option(help="No trial is begun after so many.", min=0)] = None,
    study: Annotated[str | None, typer.Option(help="By itself: named after model and data set.")] = None,
    train: Annotated[bool, typer.Option("--train", help="Train with the best options, and register that.")] = False,
    budget_minutes: Annotated[float | None, typer.Option(help="The longest that this training may take.")] = None,
    preset: Annotated[Preset | None, typer.Option(help="How many images a trial is shown; by itself: quick.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Of a trial; by itself: from the number of images.")] = None,
    architecture: flags.Architecture = None,
    size: flags.Size = None,
    sampling: flags.SamplingName = None,
    logit_adjustment: float | None = None,
    modality: flags.ModalityName = None,
    horizontal_flip: flags.HorizontalFlip = None,
    pretrained: flags.Pretrained = None,
    seed: int | None = None,
    result: flags.Result = None,
    progress: flags.Progress = None,
) -> None:
    """Look for better options on the validation split; the same command goes on, in as many processes as you like."""
    given = _options(locals())
    signal.signal(signal.SIGINT, stop)  # gives the trial back
    with _errors_told(), bars(progress) as shown:
        plan = Plan(trials, minutes, study, train)
        done = run_search(read_trainer_settings(), dataset_id, model, given, plan, shown, stop)
    typer.echo(_summary(done), err=True)
    _answer(done, result)


def _summary(done: SearchResult) -> str:
    counts = ", ".join(f"{count} {state}" for state, count in sorted(done.trials.items()))
    best = done.best
    if best is None:
        return f"No trial of study {done.study} came to its end yet ({counts})."
    own = "" if best.recipe_judged_by is None else f"; the recipe's own options gave {best.recipe_judged_by:.4f}"
    return (
        f"Best of study {done.study} ({counts}): trial {best.number}, with a validation loss of {best.judged_by:.4f} "
        f"at its own temperature{own}. Train with:\n  {' '.join(done.flags)}"
    )


@app.command()
def reproduce(
    run_id: Annotated[str, typer.Argument(help="A training's run in MLflow.")],
    max_difference: Annotated[
        float | None, typer.Option(help="End with status 8 where a validation figure differs by more.", min=0)
    ] = None,
    pretrained: Annotated[Path | None, typer.Option(help="The file of weights that the run began with.")] = None,
    result: flags.Result = None,
    progress: flags.Progress = None,
) -> None:
    """Train again as a run did, register nothing, and say how far what comes out is from what it came to."""
    with _errors_told(), _leading(settings := read_trainer_settings()), bars(progress) as shown:
        done = run_reproduction(settings, run_id, shown, stop, pretrained)
    _answer(done, result)
    if max_difference is not None and done.max_difference > max_difference:
        raise typer.Exit(UntrustedModel.exit_status)


@contextmanager
def _errors_told() -> Iterator[None]:
    try:
        yield
    except MedLoopError as exc:
        typer.echo(exc.detail, err=True)
        for issue in exc.extra.get("issues", ()):
            typer.echo(f"  {issue['where']}: {issue['detail']}", err=True)
        raise typer.Exit(exc.exit_status) from exc


def _answer(done: TrainingResult | SearchResult | Reproduction | None, result: Path | None) -> None:
    if done is None:
        return
    document = done.model_dump_json()
    if result is not None:
        result.write_text(document + "\n")
    typer.echo(document)


def main() -> None:
    signal.signal(signal.SIGTERM, stop)
    # Threads that wait for each other sleep instead of spinning, which other processes' threads could use. Read when
    # torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    configure_logging("trainer", "INFO" if not sys.stderr.isatty() else "WARNING")
    app()


if __name__ == "__main__":
    main()
