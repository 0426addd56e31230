"""`bench-engines` and `check-engine`: what another engine or precision would bring, and whether it may be used."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from medloop.bundle import Bundle, read_bundle
from medloop.cli.context import Context
from medloop.cli.models import Model, VersionOption
from medloop.cli.output import Json, console, progress_bars, show, table
from medloop.clients import EvaluatorClient
from medloop.cpus import cpu_name
from medloop.engines.bench import Measurement, bench
from medloop.engines.checks import disagreement_bound
from medloop.errors import UntrustedModel
from medloop.registry import fetch_bundle
from medloop.schemas import EngineVerdict
from medloop.settings import HomeSettings


def register(app: typer.Typer) -> None:
    app.command("bench-engines")(bench_engines)
    app.command("check-engine")(check_engine)


def bench_engines(
    model: Model = "",
    version: VersionOption = "",
    bundle: Annotated[Path | None, typer.Option(help="A bundle's folder, instead of a registered version.")] = None,
    seconds: Annotated[float, typer.Option(help="How long to measure each engine at each batch size.", min=0.1)] = 1.0,
    as_json: Json = False,
) -> None:
    """Measure every engine and precision on this machine; stop other work first."""
    found = read_bundle(bundle) if bundle is not None else _registered(model, version)
    with progress_bars() as progress:
        measured, missing = bench(found, seconds, progress)
    for what, why in missing.items():
        console.print(f"{what}: {why}")
    title = f"{found.card.architecture} at {found.card.preparation.size} px on {cpu_name()}"
    rows = [_row(one, measured) for one in measured]
    columns = [
        "engine",
        "precision",
        "threads",
        "batch",
        "images/s",
        "CPU ms",
        "CPU",
        "p50 ms",
        "p99 ms",
        "Δp",
        "load s",
    ]
    document = {"measurements": [asdict(one) for one in measured], "missing": missing, "cpu": cpu_name()}
    show(document, as_json, table(title, columns, rows))


def check_engine(
    model: Model = "",
    version: VersionOption = "",
    engine: Annotated[str, typer.Option(help="onnxruntime or openvino.")] = "openvino",
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    as_json: Json = False,
) -> int:
    """Have the evaluator compare an engine with float32 on ONNX Runtime, so that inference may use it."""
    context = Context()
    found = context.version(context.model(model or None), version or None)
    with EvaluatorClient(context.addresses["evaluator"]) as evaluator, progress_bars() as progress:
        job = evaluator.check_engine(found.model, found.version, engine, precision)
        verdict = EngineVerdict.model_validate(evaluator.wait(job, progress=progress).result)
    check, bound = verdict.check, disagreement_bound(verdict.check)
    said = (
        f"{verdict.model} version {verdict.version} in {precision} on {engine}, {check.images:,} calibration images: "
        f"|Δp| ≤ {check.max_difference:.1e}, {check.agreement:.2%} of labels equal "
        f"(on other such images fewer than {bound:.2%} change, with 95 % confidence), "
        f"{check.speedup or 0:.2f}× as fast."
    )
    text = f"{said} It may be used." if verdict.passed else f"{said} It may not be used: {verdict.reason}"
    show(verdict.model_dump(mode="json") | {"disagreement_bound": bound}, as_json, text)
    return 0 if verdict.passed else UntrustedModel.exit_status


def _registered(model: str, version: str) -> Bundle:
    context = Context()
    found = context.version(context.model(model or None), version or None)
    return fetch_bundle(context.registry, found, HomeSettings(home=context.home).bundles_dir)


def _row(one: Measurement, all_of_them: list[Measurement]) -> tuple[str | int, ...]:
    """With the CPU an image as a ratio to that of float32 on ONNX Runtime, one thread, the same batch."""
    base = next(other for other in all_of_them if (other.threads, other.batch) == (1, one.batch))
    return (
        *(one.engine, one.precision, one.threads, one.batch),
        f"{one.images_per_second:,.0f}",
        *(f"{one.cpu_ms:.3f}", f"{one.cpu_ms / base.cpu_ms:.2f}×"),
        *(f"{one.p50_ms:.2f}", f"{one.p99_ms:.2f}", f"{one.max_difference:.0e}", f"{one.load_seconds:.2f}"),
    )
