import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, Request
from medloop import cli
from medloop.cli.output import run
from medloop.errors import Conflict, InvalidDataset, Issue
from medloop.http import Readiness, create_app
from medloop.registry import CHAMPION, Registry
from medloop.schemas import ModelRef, Prediction, PredictionBatch, PredictionItem, Problem
from medloop.settings import ServerSettings
from medloop.testing import free_port, live_server, register_bundle, tiny_bundle
from medloop.vision.encode import encode_png_canonical
from medloop.vision.phantoms import CLASSES, phantom

REF = ModelRef(name="tiny", version="2", run_id="r", dataset_id="d", bundle_digest="b")


@pytest.fixture
def inference(monkeypatch: pytest.MonkeyPatch) -> Iterator[FastAPI]:
    """An inference service that calls the first image of a request dark and refuses the others."""
    router = APIRouter()

    @router.post("/v1/predict")
    async def predict() -> PredictionBatch:
        answer = Prediction(
            model=REF,
            image_hash="h",
            label="dark",
            probabilities={"dark": 0.75, "bright": 0.25},
            prediction_set=["dark", "bright"],
            coverage=0.95,
            milliseconds={},
        )
        problem = Problem(type="t", title="t", status=422, detail="Truncated: send it again.", code="invalid-image")
        return PredictionBatch(
            items=[PredictionItem(index=0, prediction=answer), PredictionItem(index=1, problem=problem)]
        )

    app = create_app("fake", ServerSettings(), routers=[router], readiness=Readiness())
    with live_server(app) as address:
        monkeypatch.setenv("MEDLOOP_INFERENCE_URL", address)
        yield app


def make_folder(folder: Path, per_class: int = 4) -> Path:
    for label in CLASSES[:2]:
        (folder / label).mkdir(parents=True)
        for index in range(per_class):
            (folder / label / f"{index}.png").write_bytes(encode_png_canonical(phantom(label, index, 0, 32)))
    return folder


def test_help_names_every_command(medloop: Any) -> None:
    status, out, _ = medloop("--help")
    assert status == 0
    for command in (
        *("demo", "up", "down", "status", "dataset", "train", "search", "evaluate", "explain", "predict", "correct"),
        *("approve", "rollback", "bench-engines", "check-engine"),
    ):
        assert command in out


def test_an_unknown_command_is_wrong_usage(medloop: Any) -> None:
    status, _, err = medloop("fly")
    assert status == 2
    assert "fly" in err


def test_nothing_running_is_said_with_a_status_of_its_own(medloop: Any) -> None:
    status, out, _ = medloop("status", "--json")
    assert (status, json.loads(out)["running"]) == (4, False)
    assert medloop("down")[0] == 0


def test_a_service_that_is_down_is_named_with_what_to_do(
    medloop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDLOOP_INFERENCE_URL", f"http://127.0.0.1:{free_port()}")
    image = make_folder(tmp_path / "x") / CLASSES[0] / "0.png"
    status, _, err = medloop("predict", str(image))
    assert status == 4
    assert "medloop up" in err


def test_predict_shows_answers_and_refusals_and_ends_with_the_refusals_status(
    medloop: Any, inference: FastAPI, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "x") / CLASSES[0]
    status, out, _ = medloop("predict", str(folder / "0.png"), str(folder / "1.png"), "--json")
    first, second = json.loads(out)["predictions"]
    assert status == 3
    assert first["prediction"]["label"] == "dark"
    assert second["problem"]["detail"].startswith("Truncated")
    status, out, _ = medloop("predict", str(folder / "0.png"), str(folder / "1.png"))
    assert "75.0%" in out
    assert "Truncated" in out


@pytest.mark.parametrize("command", [["approve", "tiny", "3"], ["rollback", "tiny"]])
def test_approving_and_rolling_back_name_the_champion_of_now(
    medloop: Any, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    for number in range(3):
        register_bundle(registry, tiny_bundle(tmp_path / f"{number}", bias=float(number)))
    registry.set_alias("tiny", CHAMPION, "2")
    router, asked = APIRouter(), []

    @router.post("/approvals")
    @router.post("/rollback")
    async def answer(request: Request) -> None:
        asked.append(await request.json())
        raise Conflict("Somebody was quicker.")

    with live_server(create_app("fake", ServerSettings(), routers=[router], readiness=Readiness())) as address:
        monkeypatch.setenv("MEDLOOP_EVALUATOR_URL", address)
        assert "Somebody was quicker" in medloop(*command)[2]
    assert [body["champion"] for body in asked] == ["2"]


def test_without_a_model_no_option_is_told_that_there_is_not(medloop: Any) -> None:
    _, _, err = medloop("rollback")
    assert "No model is known here yet" in err
    assert "--model" not in err


def test_a_file_that_is_not_there(medloop: Any) -> None:
    status, out, _ = medloop("predict", "nowhere.png", "--json")
    assert status == 6
    assert json.loads(out)["error"]["detail"] == "There is no file nowhere.png."


def test_a_data_set_is_built_shown_and_checked(medloop: Any, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "scans", 12)
    status, out, _ = medloop("dataset", "build", str(folder), "--json")
    built = json.loads(out)
    assert (status, built["images"], built["name"]) == (0, 24, "scans")
    assert sum(sum(split.values()) for split in built["counts"].values()) == 24
    assert json.loads(medloop("dataset", "build", str(folder), "--json")[1])["id"] == built["id"]
    assert json.loads(medloop("dataset", "show", "scans", "--json")[1])["id"] == built["id"]
    status, out, _ = medloop("dataset", "check", built["id"], "--distance", "4", "--json")
    assert (status, json.loads(out)["exact"]) == (0, 0)
    assert CLASSES[0] in medloop("dataset", "show", "scans")[1]


def test_everything_wrong_with_a_data_set_stands_in_one_table(medloop: Any, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "scans")
    (folder / CLASSES[0] / "broken.png").write_bytes(b"no image")
    (folder / CLASSES[1] / "empty.png").write_bytes(b"")
    status, _, err = medloop("dataset", "build", str(folder))
    assert status == 3
    assert "broken.png" in err
    assert "empty.png" in err
    assert "Traceback" not in err
    assert medloop("dataset", "build", str(folder), "--skip-unreadable")[0] == 0


def test_what_was_never_built_is_not_found(medloop: Any) -> None:
    status, _, err = medloop("dataset", "show", "nothing")
    assert status == 6
    assert "medloop dataset build" in err


def test_errors_are_told_to_scripts_as_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise InvalidDataset("One thing is wrong.", [Issue("unreadable", "a.png", "truncated")])

    monkeypatch.setattr(sys, "argv", ["medloop", "--json"])
    assert run(fail) == 3  # type: ignore[arg-type]
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "invalid-dataset"
    assert error["issues"][0]["where"] == "a.png"


def test_without_a_terminal_no_control_codes_are_printed(home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "medloop.cli", "up"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 3
    assert "\x1b" not in done.stderr
    assert "medloop demo" in done.stderr


def test_exit_statuses_are_documented() -> None:
    assert cli.__doc__ is not None
    assert f"{Conflict.exit_status} conflict" in cli.__doc__
