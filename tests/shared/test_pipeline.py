import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from medloop.errors import InvalidDataset, InvalidRequest, StorageFull, TrackingUnavailable, TrainingFailed, Unavailable
from medloop.pipeline import Pipeline, Training, run_trainer
from medloop.registry import CHALLENGER, Registry
from medloop.storage.records import RecordStore
from medloop.testing import register_bundle, tiny_bundle

TRAINING = Training("d" * 64, "tiny", {"seed": 3, "batch_size": 8, "horizontal_flip": True})


def open_pipeline(records: RecordStore, registry: Registry, training: Training = TRAINING) -> Pipeline:
    return Pipeline(records=records, registry=registry, addresses={}, training=training)


def trainer(tmp_path: Path, code: str) -> str:
    """A stand-in for the trainer's process: a program that gets its command line."""
    script = tmp_path / "trainer"
    script.write_text(
        f"#!{sys.executable}\nimport sys, json, os\nresult = sys.argv[sys.argv.index('--result') + 1]\n{code}\n"
    )
    script.chmod(0o700)
    return str(script)


def test_the_trainer_is_told_everything_and_its_result_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "json.dump({'arguments': sys.argv[1:], 'home': os.environ['MEDLOOP_HOME']}, open(result, 'w'))"
    monkeypatch.setattr(sys, "executable", trainer(tmp_path, code))
    made = run_trainer(TRAINING, {"MEDLOOP_HOME": "/somewhere"})
    arguments = made["arguments"]
    assert arguments[:3] == ["-m", "medloop_trainer", "train"]
    assert run_trainer(replace(TRAINING, verb="search"), {"MEDLOOP_HOME": ""})["arguments"][2:4] == [
        "search",
        "--dataset-id",
    ]
    assert arguments[arguments.index("--dataset-id") + 1] == TRAINING.dataset_id
    assert arguments[arguments.index("--batch-size") + 1] == "8"
    assert arguments[-1] == "--horizontal-flip"
    assert made["home"] == "/somewhere"


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (3, InvalidRequest),
        (4, Unavailable),
        (9, TrainingFailed),
        (10, StorageFull),
        (1, TrainingFailed),
        (0, TrainingFailed),
    ],
)
def test_a_trainer_that_fails_fails_the_pipeline_in_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, error: type[Exception]
) -> None:
    monkeypatch.setattr(sys, "executable", trainer(tmp_path, f"sys.exit({status})"))
    with pytest.raises(error) as caught:
        run_trainer(TRAINING)
    # The broadest class of the exit status: nothing more is known about what went wrong.
    assert not isinstance(caught.value, InvalidDataset | TrackingUnavailable)


def test_a_step_is_done_once_even_by_a_later_process(records: RecordStore, registry: Registry, tmp_path: Path) -> None:
    registered = register_bundle(registry, tiny_bundle(tmp_path / "bundle"))
    registry.set_alias("tiny", CHALLENGER, registered.version)
    calls: list[str] = []

    def train() -> dict[str, Any]:
        calls.append("train")
        return {"model": "tiny", "version": registered.version}

    first = open_pipeline(records, registry)
    assert not first.resumed
    first.step("train", train)
    second = open_pipeline(records, registry)
    assert second.resumed
    assert second.step("train", train) == {"model": "tiny", "version": registered.version}
    assert calls == ["train"]
    assert second.seconds.keys() == {"train"}


def test_a_finished_pass_and_one_with_other_inputs_are_not_resumed(records: RecordStore, registry: Registry) -> None:
    first = open_pipeline(records, registry)
    first.step("gate", dict)
    assert not open_pipeline(records, registry, Training("e" * 64, "tiny", TRAINING.options)).resumed
    first.finish()
    assert not open_pipeline(records, registry).resumed


def test_a_pass_whose_version_is_gone_is_not_resumed(records: RecordStore, registry: Registry) -> None:
    open_pipeline(records, registry).step("train", lambda: {"model": "tiny", "version": "7"})
    assert not open_pipeline(records, registry).resumed


def test_a_failed_step_is_tried_again(records: RecordStore, registry: Registry) -> None:
    def fail() -> dict[str, Any]:
        raise Unavailable("down")

    first = open_pipeline(records, registry)
    with pytest.raises(Unavailable):
        first.step("gate", fail)
    assert open_pipeline(records, registry).step("gate", lambda: {"outcome": "pass"}) == {"outcome": "pass"}
