"""`dataset build|show|check`: from somebody's images to a named, immutable data set version."""

from typing import Annotated, Any

import typer

from medloop.cli.context import Context
from medloop.cli.output import Json, progress_bars, results, show, table
from medloop.data.build import BuiltDataset, build_dataset
from medloop.data.leaks import LeakReport, load_leaks
from medloop.data.manifest import SPLITS, Manifest, latest_version, load_manifest
from medloop.data.parallel import ProgressFn
from medloop.data.sources import Source, open_source
from medloop.errors import NotFound

app = typer.Typer(name="dataset", help="Build, show and check data sets.", no_args_is_help=True)

Where = Annotated[str, typer.Argument(help="A folder, .zip, .npz, .csv, .parquet, s3:// prefix, or `phantoms`.")]
Which = Annotated[str, typer.Argument(help="A data set's name (its newest version) or id.")]


def register(parent: typer.Typer) -> None:
    parent.add_typer(app)


def build(
    context: Context,
    source: Source,
    *,
    name: str | None,
    skip_unreadable: bool,
    progress: ProgressFn,
) -> BuiltDataset:
    """Build a data set version and say what was noticed on the way."""
    return build_dataset(source, context.objects, name=name, skip_unreadable=skip_unreadable, progress=progress)


@app.command("build")
def build_command(
    data: Where,
    name: Annotated[str, typer.Option(help="The lineage's name; made from DATA when left out.")] = "",
    labels: Annotated[str, typer.Option(help="The label table of a DICOM folder.")] = "",
    skip_unreadable: Annotated[bool, typer.Option("--skip-unreadable", help="Leave unreadable files out.")] = False,
    as_json: Json = False,
) -> None:
    """Read images, find leaks, and store a version; the same data again gives the same version."""
    context = Context()
    source = open_source(data, labels=labels or None)
    with progress_bars() as progress:
        built = build(context, source, name=name or None, skip_unreadable=skip_unreadable, progress=progress)
    document = _describe(built.manifest, built.leaks)
    document["issues"] = [{"kind": i.kind, "where": i.where, "detail": i.detail} for i in built.issues]
    _print(document, as_json)


@app.command("show")
def show_command(dataset: Which, as_json: Json = False) -> None:
    """Show a version: its classes, and how many images each split has of each."""
    manifest, leaks = _load(Context(), dataset)
    _print(_describe(manifest, leaks), as_json)


@app.command("check")
def check_command(
    dataset: Which,
    distance: Annotated[int, typer.Option(help="Bits of 64 that perceptual hashes may differ by.", min=0, max=16)] = 2,
    as_json: Json = False,
) -> None:
    """Look for images that stand in more than one split."""
    context = Context()
    manifest, leaks = _load(context, dataset)
    with progress_bars() as progress:
        leaks = leaks if leaks.distance == distance else _recheck(context, manifest, distance, progress)
    show(leaks.to_document(), as_json, f"exact: {leaks.exact}, near (within {leaks.distance} of 64 bits): {leaks.near}")
    if not as_json and leaks.near:
        columns = ["what", "exact", f"within {leaks.distance} bits"]
        results.print(table("Images that stand in more than one split", columns, list(leaks.table())))


def resolve(context: Context, dataset: str) -> str:
    """The id of a data set version that is named by id or by its lineage's name."""
    found = latest_version(context.objects, dataset)
    if found is not None:
        return found
    if len(dataset) == 64:
        return dataset
    raise NotFound(f"There is no data set {dataset!r} here; build it with: medloop dataset build")


def _recheck(context: Context, manifest: Manifest, distance: int, progress: ProgressFn) -> LeakReport:
    from medloop.data.leaks import check_leaks

    return check_leaks(manifest, context.objects, distance=distance, progress=progress)


def _load(context: Context, dataset: str) -> tuple[Manifest, LeakReport]:
    dataset_id = resolve(context, dataset)
    return load_manifest(context.objects, dataset_id), load_leaks(context.objects, dataset_id)


def _describe(manifest: Manifest, leaks: LeakReport) -> dict[str, Any]:
    return {
        "id": manifest.id,
        "name": manifest.name,
        "parent": manifest.parent,
        "images": len(manifest.rows),
        "classes": list(manifest.classes),
        "counts": manifest.counts(),
        "leaks": {"exact": leaks.exact, "near": leaks.near, "distance": leaks.distance},
    }


def _print(document: dict[str, Any], as_json: bool) -> None:
    counts = document["counts"]
    rows = [(name, *(counts[split].get(name, 0) for split in SPLITS)) for name in document["classes"]]
    shown = table(f"{document['name']} {document['id'][:12]}: {document['images']:,} images", ["class", *SPLITS], rows)
    leaks = document["leaks"]
    shown.caption = f"in more than one split: {leaks['exact']} exactly, {leaks['near']} within {leaks['distance']} bits"
    show(document, as_json, shown)
    if not as_json and document.get("issues"):
        issues = [(i["kind"], i["where"], i["detail"]) for i in document["issues"]]
        results.print(table("Noticed", ["kind", "where", "what"], issues))
