"""`demo`, `up`, `down`, `status`: everything on this machine."""

import os
import signal
import subprocess
import sys
import time
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from medloop.cli.context import Context
from medloop.cli.dataset import build
from medloop.cli.output import Json, console, progress_bars, results, show, table
from medloop.clients import InferenceClient
from medloop.data.build import BuiltDataset
from medloop.data.sources import PHANTOMS, open_source
from medloop.errors import InvalidRequest, Unavailable
from medloop.pipeline import Pipeline, Training, wait_until_served
from medloop.registry import CHALLENGER, CHAMPION, Registry
from medloop.schemas import Prediction
from medloop.stack import Stack, environment, health, read_state, stop_running

PHANTOM_EPOCHS = 8
"""Enough for the synthetic set; more would only make the first look at MedLoop a longer wait."""
START_SECONDS = 240.0


class Ports(StrEnum):
    fixed = "fixed"
    auto = "auto"


PortsOption = Annotated[Ports, typer.Option(help="`auto` takes free ports; `fixed` those of the documentation.")]


def register(app: typer.Typer) -> None:
    app.command()(demo)
    app.command()(up)
    app.command()(down)
    app.command()(status)


def demo(
    data: Annotated[str, typer.Option(help="Your images: a folder, .zip, .npz, .csv, .parquet or s3:// prefix.")] = "",
    name: Annotated[
        str, typer.Option(help="The data set's and so the model's name; made from DATA when left out.")
    ] = "",
    size: Annotated[int, typer.Option(help="Side in pixels that images are prepared to; 0 chooses.")] = 0,
    epochs: Annotated[int, typer.Option(help="Passes over the training images; 0 chooses.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of training.")] = 0,
    ports: PortsOption = Ports.fixed,
    skip_unreadable: Annotated[bool, typer.Option("--skip-unreadable", help="Leave unreadable files out.")] = False,
    leave: Annotated[bool, typer.Option("--exit", help="End after the loop instead of staying up.")] = False,
    as_json: Json = False,
) -> int:
    """Run the whole loop once, and stay up: train, evaluate, explain, approve, serve, look."""
    context = Context()
    source = open_source(data or PHANTOMS)
    epochs = epochs or (0 if data else PHANTOM_EPOCHS)
    model = name or source.suggested_name
    _stop_on_signals()
    console.print(f"MedLoop keeps its state in {context.home}")
    with Stack(context.home, model, automatic_ports=ports is Ports.auto) as stack:
        started = time.monotonic()
        seconds: dict[str, float] = {}
        stack.start("mlflow")  # its first start takes longest
        with progress_bars() as progress:
            built = build(context, source, name=model, skip_unreadable=skip_unreadable, progress=progress)
        seconds["dataset"] = time.monotonic() - started
        console.print("Waiting for MLflow (its first start makes a database) …")
        stack.wait("mlflow", timeout=START_SECONDS)
        seconds["mlflow"] = time.monotonic() - started
        stack.start()
        options: dict[str, str | int | float] = {"seed": seed, "preset": "quick"}  # people wait for it
        options |= {key: value for key, value in (("size", size), ("epochs", epochs)) if value}
        prediction, passed = _loop(context, stack, Training(built.manifest.id, model, options), built)
        seconds |= {"first_prediction": time.monotonic() - started, **passed.seconds}
        stack.wait(timeout=START_SECONDS)
        seconds["total"] = time.monotonic() - started
        document = _summary(stack, built, passed, prediction, seconds)
        _show_summary(document, as_json)
        if leave:
            return 0
        console.print("Ctrl-C stops everything.")
        _stay(stack)
    console.print("Stopped.")
    return 0


def up(
    model: Annotated[str, typer.Option(help="The model that inference serves; the last trained when left out.")] = "",
    ports: PortsOption = Ports.fixed,
    detach: Annotated[bool, typer.Option("--detach", help="Go on in the background; medloop down stops it.")] = False,
    as_json: Json = False,
) -> int:
    """Start all services on this machine and stay until Ctrl-C."""
    context = Context()
    named = context.model(model or None)
    if detach:
        return _detach(context, named, ports, as_json)
    _stop_on_signals()
    with Stack(context.home, named, automatic_ports=ports is Ports.auto) as stack:
        stack.start()
        console.print("Starting …")
        stack.wait(timeout=START_SECONDS)
        show({"model": named, "addresses": stack.addresses}, as_json, _addresses(stack.addresses))
        console.print("Ctrl-C stops everything.")
        _stay(stack)
    console.print("Stopped.")
    return 0


def down(as_json: Json = False) -> None:
    """Stop what medloop up or medloop demo started from this home."""
    stopped = stop_running(Context().home, lambda text: console.print(text))
    show({"stopped": stopped}, as_json, "Stopped." if stopped else "Nothing runs from this home.")


def status(as_json: Json = False) -> int:
    """Show which services run, where, and what inference answers with."""
    context = Context()
    if context.stack is None:
        show({"running": False, "home": str(context.home)}, as_json, f"Nothing runs from {context.home}.")
        return Unavailable.exit_status
    services = health(context.stack)
    document: dict[str, Any] = {"running": True, "home": str(context.home), "services": services}
    rows = [
        (name, s["address"], "ready" if s["ready"] else "not ready" if s["running"] else "not running")
        for name, s in services.items()
    ]
    shown = table(f"MedLoop in {context.home}", ["service", "address", "state"], rows)
    if services["inference"]["running"]:
        with InferenceClient(context.addresses["inference"]) as inference:
            served = inference.served_model()
        document["model"] = served.model_dump(mode="json")
        shown.caption = (
            f"serves {served.model.name} version {served.model.version}" if served.model else "serves nothing"
        )
    show(document, as_json, shown)
    return 0 if all(s["ready"] for s in services.values()) else Unavailable.exit_status


def _loop(context: Context, stack: Stack, training: Training, built: BuiltDataset) -> tuple[Prediction, Pipeline]:
    pipeline = Pipeline(
        records=context.records,
        registry=Registry(stack.addresses["mlflow"]),
        addresses=stack.addresses,
        training=training,
        environment=environment(context.home, training.model, stack.addresses),
    )
    if pipeline.resumed:
        console.print("An earlier pass over the same data was cut off; going on where it stopped.")
    console.print("Training …")
    trained = pipeline.train()
    console.print(f"Registered {trained['model']} version {trained['version']}")
    stack.wait("evaluator", path="/readyz", timeout=START_SECONDS)
    with progress_bars() as progress:
        pipeline.progress = progress
        pipeline.evaluate()
    stack.wait("explainer", path="/readyz", timeout=START_SECONDS)
    with progress_bars() as progress:
        pipeline.progress = progress
        pipeline.explain()
    decision = pipeline.gate()
    console.print(f"Gate: {decision['outcome']}. {decision['reason']}")
    pipeline.bootstrap()
    champion = pipeline.registry.at_alias(training.model, CHAMPION)
    if champion is None:
        raise InvalidRequest(f"Model {training.model} has no champion; approve one with: medloop approve")
    wait_until_served(stack.addresses["inference"], champion.version)
    first = next(row for row in built.manifest.of("test"))
    with InferenceClient(stack.addresses["inference"]) as inference:
        prediction = inference.predict(context.objects.get(first.location))
    pipeline.finish()
    return prediction, pipeline


def _summary(
    stack: Stack, built: BuiltDataset, pipeline: Pipeline, prediction: Prediction, seconds: dict[str, float]
) -> dict[str, Any]:
    trained, report = pipeline.train(), pipeline.evaluate()
    alias = pipeline.bootstrap()["alias"]
    return {
        "dataset": {
            "id": built.manifest.id,
            "name": built.manifest.name,
            "images": len(built.manifest.rows),
            "classes": list(built.manifest.classes),
            "leaks": {"exact": built.leaks.exact, "near": built.leaks.near},
        },
        "metrics": {name: report["metrics"][name]["value"] for name in ("accuracy", "auc", "ece")},
        "intervals": {
            name: [report["metrics"][name]["low"], report["metrics"][name]["high"]]
            for name in ("accuracy", "auc", "ece")
        },
        "model": {"name": trained["model"], "version": trained["version"], "alias": alias},
        "prediction": prediction.model_dump(mode="json"),
        "addresses": {name: stack.addresses[name] for name in sorted(stack.addresses)},
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }


def _show_summary(document: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show(document, True, "")
        return
    model, data = document["model"], document["dataset"]
    figures = []
    for name, value in document["metrics"].items():
        low, high = document["intervals"][name]
        figures.append(f"{name} {value:.4f} (95 % {low:.4f} to {high:.4f})")
    results.print()
    results.print(
        f"{data['name']}: {data['images']:,} images, {len(data['classes'])} classes; "
        f"in more than one split: {data['leaks']['exact']} exactly, {data['leaks']['near']} nearly"
    )
    results.print(f"{model['name']} version {model['version']} is the {model['alias']}. On the test split:")
    for figure in figures:
        results.print(f"  {figure}")
    prediction = Prediction.model_validate(document["prediction"])
    share = prediction.probabilities[prediction.label]
    results.print(
        f"First prediction, after {document['seconds']['first_prediction']:.0f} s: {prediction.label} ({share:.1%})"
    )
    results.print()
    results.print(_addresses(document["addresses"]))
    if model["alias"] == CHALLENGER:
        results.print(f"The champion stays until a person approves: medloop approve {model['name']} {model['version']}")


def _addresses(addresses: dict[str, str]) -> Any:
    return table("Running on this machine", ["service", "address"], sorted(addresses.items()))


def _stay(stack: Stack) -> None:
    """Until Ctrl-C or SIGTERM; raises Unavailable when a service ends by itself."""
    try:
        while True:
            stack.check()
            time.sleep(1)
    except KeyboardInterrupt:
        console.print("Stopping …")


def _stop_on_signals() -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    # Also where a shell started us in the background, which would have it ignored.
    signal.signal(signal.SIGINT, interrupt)


def _detach(context: Context, model: str, ports: Ports, as_json: bool) -> int:
    command = [sys.executable, "-m", "medloop.cli", "up", "--model", model, "--ports", ports.value]
    context.home.mkdir(parents=True, exist_ok=True)
    log = context.home / "logs" / "up.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(  # noqa: S603 - our own command line
            command,
            env={**os.environ, "MEDLOOP_HOME": str(context.home)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise Unavailable(f"It ended with exit status {process.returncode}: {_last_line(log)}")
        state = read_state(context.home)
        if (
            state is not None
            and state.running
            and all(s["ready"] or n == "inference" for n, s in health(state).items())
        ):
            show({"model": model, "addresses": state.addresses}, as_json, _addresses(state.addresses))
            return 0
        time.sleep(0.5)
    raise Unavailable(f"Not everything answered within {START_SECONDS:.0f} s; look into {log.parent}.")


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
