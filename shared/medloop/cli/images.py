"""`predict` and `correct`: ask about images, and say where an answer was wrong."""

from pathlib import Path
from typing import Annotated, Any

import typer

from medloop.cli.context import Context
from medloop.cli.folder import predict_folder
from medloop.cli.output import Json, show, table, user_name
from medloop.clients import InferenceClient
from medloop.errors import InvalidImage, InvalidRequest, NotFound
from medloop.schemas import PredictionItem

BATCH = 32


def register(app: typer.Typer) -> None:
    app.command()(predict)
    app.command()(correct)


def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files, or one folder.")],
    out: Annotated[
        Path | None, typer.Option(help="For a folder: the table to write, .parquet, .csv or .ndjson.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Ask the champion about images; each is answered or refused on its own.

    A folder is walked with everything below it, and its answers are written to a table; a run that was cut short goes
    on where it ended.
    """
    if any(path.is_dir() for path in images) or out is not None:
        if len(images) > 1 or out is None or not images[0].is_dir():
            raise InvalidRequest("For a whole folder give that one folder, and --out with the name of the table.")
        return predict_folder(Context().addresses["inference"], images[0], out, as_json)
    data = [_read(path) for path in images]
    items: list[PredictionItem] = []
    with InferenceClient(Context().addresses["inference"]) as inference:
        for start in range(0, len(data), BATCH):
            items += inference.predict_many(data[start : start + BATCH]).items
    rows: list[tuple[Any, ...]] = []
    documents = []
    for path, item in zip(images, items, strict=True):
        documents.append({"file": str(path), **item.model_dump(mode="json", exclude={"index"}, exclude_none=True)})
        if item.prediction is not None:
            p = item.prediction
            rows.append((path.name, p.label, f"{p.probabilities[p.label]:.1%}", ", ".join(p.prediction_set), p.id))
        elif item.problem is not None:
            rows.append((path.name, "refused", "", item.problem.detail, ""))
    title = _title(items)
    show({"predictions": documents}, as_json, table(title, ["file", "label", "p", "cannot rule out", "id"], rows))
    return 0 if all(item.prediction for item in items) else InvalidImage.exit_status


def correct(
    prediction_id: Annotated[str, typer.Argument(help="The id that came with the answer.")],
    label: Annotated[str, typer.Option(help="The right class.")],
    image: Annotated[Path, typer.Option(help="The image that was asked about.")],
    author: Annotated[str, typer.Option(help="Who corrects; you, when left out.")] = "",
    comment: Annotated[str, typer.Option(help="Anything a reviewer should know.")] = "",
    as_json: Json = False,
) -> None:
    """Store the right label for a predicted image; it waits for review before it is trained on."""
    with InferenceClient(Context().addresses["inference"]) as inference:
        stored = inference.correct(
            prediction_id, label=label, author=author or user_name(), image=_read(image), comment=comment
        )
    show(stored.model_dump(mode="json"), as_json, f"Stored as {stored.id}, {stored.status}.")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as exc:
        raise NotFound(f"There is no file {path}.") from exc
    except OSError as exc:
        raise InvalidRequest(f"{path} cannot be read: {exc.strerror}.") from exc


def _title(items: list[PredictionItem]) -> str:
    models = {f"{i.prediction.model.name} version {i.prediction.model.version}" for i in items if i.prediction}
    return f"Answered by {', '.join(sorted(models))}" if models else "No image could be answered"
