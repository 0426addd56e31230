"""A whole folder's answers in one table: complete, resumable, and the same in every format."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fastapi import APIRouter, Request, Response
from medloop.cli import folder as folder_module
from medloop.cli.results import Journal, Row
from medloop.errors import InvalidRequest, MedLoopError, Overloaded, UnsupportedImage
from medloop.http import Readiness, create_app, problem, require
from medloop.schemas import ModelRef, Outlier, Prediction, ServedModel
from medloop.settings import ServerSettings
from medloop.testing import live_server

PNG = b"\x89PNG\r\n\x1a\n"


class Inference:
    """Speaks as inference does; an image's label is what stands behind the PNG signature."""

    def __init__(self) -> None:
        self.version = "1"
        self.asked: list[bytes] = []
        self.refusals = 0
        self.breaks_after: int | None = None

    @property
    def ref(self) -> ModelRef:
        return ModelRef(name="tiny", version=self.version, run_id="r", dataset_id="d", bundle_digest="b")

    def answer(self, image: bytes) -> Prediction | MedLoopError:
        label = image.removeprefix(PNG).decode()
        if label == "poison":
            return UnsupportedImage("This is no image.")
        if label == "busy" and self.asked.count(image) == 1:
            return Overloaded("Later.")
        return Prediction(
            model=self.ref,
            image_hash="h",
            label=label[:4],
            probabilities={"dark": 0.25, "brig": 0.75},
            prediction_set=["dark", "brig"],
            coverage=0.9,
            outlier=Outlier(score=1.5, percentile=80.0, threshold=None),
            decision="refer",
            reasons=["ambiguous"],
            milliseconds={},
        )

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1", dependencies=[require("predict")])

        @router.get("/model")
        async def model() -> ServedModel:
            return ServedModel(model=self.ref, classes=["dark", "brig"])

        @router.post("/predict/stream")
        async def stream(request: Request) -> Response:
            if self.refusals:
                self.refusals -= 1
                raise Overloaded("Later.", retry_after=1)
            async with request.form() as form:
                images = [await part.read() for _, part in form.multi_items() if not isinstance(part, str)]
            lines: list[bytes] = []
            for index, image in reversed(list(enumerate(images))):
                if self.breaks_after is not None and len(self.asked) >= self.breaks_after:
                    return Response(b"".join(lines))
                self.asked.append(image)
                outcome = self.answer(image)
                found = (
                    {"problem": problem(outcome).model_dump(mode="json")}
                    if isinstance(outcome, MedLoopError)
                    else {"prediction": outcome.model_dump(mode="json")}
                )
                lines.append(json.dumps({"index": index, "id": f"{index}", **found}).encode() + b"\n")
            return Response(b"".join(lines) + b'{"summary": {}}\n')

        return router


@pytest.fixture
def inference(monkeypatch: pytest.MonkeyPatch) -> Iterator[Inference]:
    fake = Inference()
    app = create_app("fake", ServerSettings(), routers=[fake.router()], readiness=Readiness())
    with live_server(app) as address:
        monkeypatch.setenv("MEDLOOP_INFERENCE_URL", address)
        yield fake


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    (folder / "inner").mkdir(parents=True)
    for name, label in [("a.png", "dark"), ("inner/b", "bright"), ("inner/ö,.png", "dark 2"), ("p.png", "poison")]:
        (folder / name).write_bytes(PNG + label.encode())
    (folder / "notes.txt").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    return folder


def rows_of(out: Path) -> list[dict[str, Any]]:
    """The rows of any format, with lists and numbers as such."""
    if out.suffix == ".parquet":
        rows: list[dict[str, Any]] = pq.read_table(out).to_pylist()
        return rows
    if out.suffix == ".ndjson":
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        return [row | {f"p_{k}": v for k, v in (row.pop("probabilities") or {}).items()} for row in rows]
    with out.open(newline="") as file:
        return [
            {
                name: None if not v else json.loads(v) if name in ("prediction_set", "reasons", "p_dark") else v
                for name, v in row.items()
            }
            for row in csv.DictReader(file)
        ]


@pytest.mark.parametrize("name", ["out.parquet", "out.csv", "out.ndjson"])
def test_every_file_has_its_row_in_every_format(
    medloop: Any, inference: Inference, scans: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / name
    status, text, _ = medloop("predict", str(scans), "--out", str(out), "--json")
    told = json.loads(text)
    assert status == 3  # one was refused
    counts = {"files": 6, "answered": 3, "refused": 1, "skipped": 2, "referred": 3, "asked": 4}
    assert told | counts == told
    assert told["labels"] == {"dark": 2, "brig": 1}
    rows = {row["file"]: row for row in rows_of(out)}
    assert list(rows) == ["a.png", "empty.png", "inner/b", "inner/ö,.png", "notes.txt", "p.png"]
    answered = rows["inner/ö,.png"]
    assert (answered["label"], answered["p_dark"], answered["version"]) == ("dark", 0.25, "1")
    assert (answered["prediction_set"], answered["reasons"]) == (["dark", "brig"], ["ambiguous"])
    assert (rows["p.png"]["status"], rows["p.png"]["error_code"]) == ("refused", "unsupported-image")
    assert "not an image" in rows["notes.txt"]["error"]
    assert not list(tmp_path.glob("*.partial*"))
    assert not list(tmp_path.glob(".*.part"))

    inference.asked.clear()
    (scans / "a.png").write_bytes(PNG + b"bright, now")
    (scans / "new.png").write_bytes(PNG + b"dark")
    medloop("predict", str(scans), "--out", str(out))
    assert sorted(inference.asked) == sorted([PNG + b"bright, now", PNG + b"dark", PNG + b"poison"])
    assert {row["file"]: row["label"] for row in rows_of(out)}["a.png"] == "brig"

    inference.version = "2"
    status, text, _ = medloop("predict", str(scans), "--out", str(out), "--json")
    assert json.loads(text)["versions"] == {"tiny version 2": 4}


def test_a_run_that_was_cut_short_goes_on_where_it_ended(
    medloop: Any, inference: Inference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "BATCH_IMAGES", 4)
    monkeypatch.setattr(folder_module, "REQUESTS", 1)
    scans, out = tmp_path / "scans", tmp_path / "out.csv"
    scans.mkdir()
    for index in range(12):
        (scans / f"{index:02}.png").write_bytes(PNG + f"dark{index}".encode())
    inference.breaks_after = 9
    status, _, err = medloop("predict", str(scans), "--out", str(out))
    assert status == 4
    assert "goes on from there" in err
    assert not out.exists()
    journal = tmp_path / "out.csv.partial.ndjson"
    with journal.open("ab") as file:
        file.write(b'{"file": "10.png", "sta')  # as a kill leaves it

    inference.breaks_after = None
    inference.asked.clear()
    status, _, _ = medloop("predict", str(scans), "--out", str(out))
    assert status == 0
    assert len(inference.asked) == 4
    assert [row["label"] for row in rows_of(out)] == ["dark"] * 12
    assert not journal.exists()


def test_a_busy_service_is_asked_again(medloop: Any, inference: Inference, scans: Path, tmp_path: Path) -> None:
    (scans / "p.png").write_bytes(PNG + b"busy")
    inference.refusals = 1
    status, text, _ = medloop("predict", str(scans), "--out", str(tmp_path / "o.ndjson"), "--json")
    assert (status, json.loads(text)["answered"]) == (0, 4)
    assert inference.asked.count(PNG + b"busy") == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["FOLDER"], "--out"),
        (["FOLDER", "FOLDER", "--out", "o.csv"], "that one folder"),
        (["FOLDER/a.png", "--out", "o.csv"], "that one folder"),
        (["FOLDER", "--out", "o.xlsx"], "must end in .parquet, .csv, .ndjson"),
    ],
)
def test_what_cannot_be_meant_is_told(medloop: Any, scans: Path, arguments: list[str], says: str) -> None:
    status, _, err = medloop("predict", *(argument.replace("FOLDER", str(scans)) for argument in arguments))
    assert status == 3
    assert says in err


def test_no_table_of_somebody_else_is_written_over(
    medloop: Any, inference: Inference, scans: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mine.csv"
    out.write_text("name,age\nx,7\n")
    status, _, err = medloop("predict", str(scans), "--out", str(out))
    assert status == 3
    assert "no table of predictions" in err
    assert out.read_text() == "name,age\nx,7\n"


def test_a_table_is_whole_or_not_there(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    with Journal(out) as journal:
        journal.add([Row(file="a", status="skipped"), Row(file="b", status="skipped")])

    def stop(row: Row) -> None:
        if row.file == "b":
            raise InvalidRequest("Half way.")

    with pytest.raises(InvalidRequest):
        journal.finish(["a", "b"], [], stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv.partial.ndjson"]
