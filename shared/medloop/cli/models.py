"""`train`, `retrain`, `search`, `reproduce`, `evaluate`, `explain`, `approve`, `rollback`: a model version's life."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from medloop.cli import dataset as datasets
from medloop.cli.context import Context
from medloop.cli.output import Json, progress_bars, results, show, table, user_name
from medloop.clients import EvaluatorClient, ExplainerClient
from medloop.data.manifest import load_manifest
from medloop.errors import InvalidRequest, UntrustedModel
from medloop.pipeline import Reproducing, Training, run_trainer
from medloop.registry import CHALLENGER, CHAMPION
from medloop.schemas import EvaluationReport, ExplanationCreate
from medloop.stack import environment

Model = Annotated[str, typer.Argument(help="The model's name; the one that runs here when left out.")]
VersionOption = Annotated[str, typer.Argument(help="A version number or alias; the challenger, else the champion.")]
Approver = Annotated[str, typer.Option(help="Who takes responsibility; you, when left out.")]


def register(app: typer.Typer) -> None:
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(context_settings=settings)(train)
    app.command(context_settings=settings)(retrain)
    app.command(context_settings=settings)(search)
    app.command()(reproduce)
    app.command()(evaluate)
    app.command()(explain)
    app.command()(approve)
    app.command()(rollback)


def train(
    arguments: typer.Context,
    dataset: Annotated[str, typer.Argument(help="A data set's name or id; medloop dataset build makes one.")],
    as_json: Json = False,
) -> None:
    """Train a new version on a data set. Options of the trainer may follow: --epochs 20 --architecture resnet18."""
    made = _have_trained("train", dataset, arguments.args)
    show(made, as_json, f"Registered {made['model']} version {made['version']} as challenger (run {made['run_id']}).")


def retrain(
    arguments: typer.Context,
    dataset: Annotated[str, typer.Argument(help="A data set's name (its newest version) or a version's id.")],
    as_json: Json = False,
) -> None:
    """Train the champion further on a new version of its data set. Options may follow: --correction-weight 8."""
    made = _have_trained("retrain", dataset, arguments.args)
    which = f"{made['model']} version {made['version']} (from version {made['parent']['version']})"
    show(made, as_json, f"Registered {which} as challenger (run {made['run_id']}).")


def search(
    arguments: typer.Context,
    dataset: Annotated[str, typer.Argument(help="A data set's name or id; medloop dataset build makes one.")],
    as_json: Json = False,
) -> None:
    """Look for the options that train best on a data set. Options may follow: --trials 40 --minutes 60 --train."""
    made = _have_trained("search", dataset, arguments.args)
    best = made["best"]
    found = f"medloop train {made['model']} {' '.join(made['flags'])}" if best else "No trial came to its end yet."
    show(made, as_json, found)


def reproduce(
    run_id: Annotated[str, typer.Argument(help="A training's run in MLflow: 32 hex digits.")],
    max_difference: Annotated[
        float | None, typer.Option(help="End with status 8 where a validation figure differs by more.", min=0)
    ] = None,
    pretrained: Annotated[Path | None, typer.Option(help="The file of weights that the run began with.")] = None,
    as_json: Json = False,
) -> int:
    """Train again as a run did, and say how far what comes out is from what it came to; nothing is registered."""
    context = Context()
    surroundings = environment(context.home, context.last_model() or "", context.addresses)
    made = run_trainer(Reproducing(run_id, pretrained), surroundings)
    show(made, as_json, _comparison_table(made))
    if not as_json and made["differs"]:
        rows = [(each["what"], each["then"] or "none", each["now"] or "none") for each in made["differs"]]
        results.print(table("What is not as it was", ["what", "then", "now"], rows))
    differs = max_difference is not None and made["max_difference"] > max_difference
    return UntrustedModel.exit_status if differs else 0


def evaluate(model: Model = "", version: VersionOption = "", as_json: Json = False) -> None:
    """Evaluate a version on the test split of its data set."""
    context = Context()
    found = context.version(context.model(model or None), version or None)
    with EvaluatorClient(context.addresses["evaluator"]) as evaluator, progress_bars() as progress:
        evaluator.wait(evaluator.evaluate(found.model, found.version), progress=progress)
        report = evaluator.report(found.model, found.version)
    show(report.model_dump(mode="json"), as_json, _report_table(report))


def explain(
    model: Model = "",
    version: VersionOption = "",
    images: Annotated[int, typer.Option(help="How many test images to explain.", min=1, max=256)] = 12,
    as_json: Json = False,
) -> None:
    """Explain answers to test images; the overlays become artifacts of the version's run."""
    context = Context()
    found = context.version(context.model(model or None), version or None)
    request = ExplanationCreate(model=found.model, version=found.version, images=images)
    with ExplainerClient(context.addresses["explainer"]) as explainer, progress_bars() as progress:
        job = explainer.wait(explainer.explain_set(request), progress=progress)
    where = f"{context.addresses['mlflow']}/#/experiments (run {found.run_id}, artifacts, explanations)"
    show(job.model_dump(mode="json"), as_json, f"Explained {images} images: {where}")


def approve(
    model: Model = "",
    version: VersionOption = "",
    approver: Approver = "",
    override: Annotated[str, typer.Option(help="Why to approve although the gate failed.")] = "",
    as_json: Json = False,
) -> None:
    """Make a version the champion: the evaluator checks, signs and records it; inference follows by itself."""
    context = Context()
    found = context.version(context.model(model or None), version or None, CHALLENGER)
    with EvaluatorClient(context.addresses["evaluator"]) as evaluator:
        signed = evaluator.approve(
            found.model,
            found.version,
            approver=approver or user_name(),
            override=override or None,
            champion=_champion(context, found.model),
        )
    show(signed.model_dump(mode="json"), as_json, f"{signed.model} version {signed.version} is the champion.")


def rollback(
    model: Model = "",
    approver: Approver = "",
    reason: Annotated[str, typer.Option(help="Why.")] = "",
    as_json: Json = False,
) -> None:
    """Go back to the champion before this one."""
    context = Context()
    name = context.model(model or None)
    with EvaluatorClient(context.addresses["evaluator"]) as evaluator:
        signed = evaluator.rollback(
            name, approver=approver or user_name(), reason=reason, champion=_champion(context, name)
        )
    show(signed.model_dump(mode="json"), as_json, f"{signed.model} is back at version {signed.version}.")


def _champion(context: Context, model: str) -> str | None:
    """The champion as it is now: what the person means to replace or to leave."""
    found = context.registry.at_alias(model, CHAMPION)
    return None if found is None else found.version


def _have_trained(verb: Literal["train", "retrain", "search"], dataset: str, arguments: list[str]) -> dict[str, Any]:
    context = Context()
    manifest = load_manifest(context.objects, datasets.resolve(context, dataset))
    training = Training(manifest.id, manifest.name, _options(arguments), verb)
    return run_trainer(training, environment(context.home, manifest.name, context.addresses))


def _options(arguments: list[str]) -> dict[str, str | bool]:
    """`--name value` and bare `--name`, as the trainer takes them."""
    options: dict[str, str | bool] = {}
    for argument in arguments:
        if argument.startswith("--"):
            options[argument.removeprefix("--")] = True
        elif options and next(reversed(options.values())) is True:
            options[next(reversed(options))] = argument
        else:
            raise InvalidRequest(f"{argument!r} follows no option of the trainer; give them like --epochs 20.")
    return options


def _comparison_table(made: dict[str, Any]) -> Table:
    """What a reproduction came to, beside the original: figures in the end, and the largest |Δ| of any epoch."""
    equal = "equal to the bit" if made["weights_equal"] else "differ"
    rows = [("weights (SHA-256)", made["weights_then"][:12], made["weights_now"][:12], equal)]
    for name, pair in {"epochs": made["epochs"], **made["figures"]}.items():
        rows.append((name, f"{pair['then']:g}", f"{pair['now']:g}", f"{abs(pair['now'] - pair['then']):.2g}"))
    for name, curve in made["curves"].items():
        rows.append((f"{name}, by epoch", "", "", f"{curve['max_difference']:.2g} (epoch {curve['epoch']})"))
    shown = table(f"Run {made['reproduces']}, and again as {made['run_id']}", ["figure", "then", "now", "|Δ|"], rows)
    shown.caption = f"largest |Δ| of a validation figure: {made['max_difference']:.2g}"
    return shown


def _report_table(report: EvaluationReport) -> Table:
    figures = report.metrics | (report.served.figures if report.served is not None else {})
    rows = [(name, f"{m.value:.4f}", f"{m.low:.4f} – {m.high:.4f}", m.method) for name, m in figures.items()]
    title = f"{report.model.name} version {report.model.version} on {report.images:,} {report.split} images"
    return table(title, ["metric", "value", "95 % interval", "by"], rows)
