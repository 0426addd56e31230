"""`retrain` and `reproduce`: what the trainer is asked, and what becomes of its answer."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from medloop import cli
from medloop.cli.output import run
from medloop.data.build import build_dataset
from medloop.data.sources import phantom_source
from medloop.storage.objects import ObjectStore

REPRODUCED = {
    "run_id": "b" * 32,
    "reproduces": "a" * 32,
    "weights_then": "1" * 64,
    "weights_now": "2" * 64,
    "weights_equal": False,
    "max_difference": 0.25,
    "epochs": {"then": 3, "now": 3},
    "figures": {"best_val_loss": {"then": 0.5, "now": 0.625}},
    "curves": {"val_loss": {"max_difference": 0.25, "epoch": 2}},
    "differs": [{"what": "torch", "then": "2.14", "now": None}],
}
RETRAINED = {"model": "phantoms", "version": "4", "run_id": "c" * 32, "parent": {"version": "3"}}


@pytest.fixture
def medloop(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command line, with a stand-in for the trainer's process that notes what it was asked."""
    script = home / "trainer"
    answers = json.dumps({"reproduce": REPRODUCED, "retrain": RETRAINED})
    script.write_text(
        f"#!{sys.executable}\nimport json, sys\nplace = sys.argv.index('--result')\nresult = sys.argv[place + 1]\n"
        f"answer = json.loads({answers!r})[sys.argv[3]]\n"
        "json.dump({**answer, 'asked': sys.argv[1:place] + sys.argv[place + 2:]}, open(result, 'w'))\n"
    )
    script.chmod(0o700)

    def call(*arguments: str) -> tuple[int, str]:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["medloop", *arguments])
            patch.setattr(sys, "executable", str(script))
            status = run(cli.app)
        return status, capsys.readouterr().out

    return call


def test_a_reproduction_is_shown_beside_the_original(medloop: Any) -> None:
    status, out = medloop("reproduce", "a" * 32)
    assert status == 0
    for text in ("differ", "111111111111", "0.625", "0.12", "0.25 (epoch 2)", "torch", "2.14", "none"):
        assert text in out
    status, out = medloop("reproduce", "a" * 32, "--json", "--pretrained", "x.pth")
    assert status == 0
    document = json.loads(out)
    assert document["max_difference"] == 0.25
    assert document["asked"] == ["-m", "medloop_trainer", "reproduce", "a" * 32, "--pretrained", "x.pth"]


@pytest.mark.parametrize(("allowed", "status"), [("0.25", 0), ("0.2", 8)])
def test_a_difference_beyond_what_is_allowed_is_a_status(medloop: Any, allowed: str, status: int) -> None:
    assert medloop("reproduce", "a" * 32, "--max-difference", allowed, "--json")[0] == status


def test_retraining_takes_the_newest_version_of_the_data_set(medloop: Any, objects: ObjectStore) -> None:
    build_dataset(phantom_source(per_class=4, size=16, seed=0), objects)
    newest = build_dataset(phantom_source(per_class=5, size=16, seed=0), objects).manifest
    status, out = medloop("retrain", "phantoms", "--correction-weight", "8")
    assert status == 0
    assert "Registered phantoms version 4 (from version 3) as challenger" in out
    asked = json.loads(medloop("retrain", "phantoms", "--json", "--correction-weight", "8")[1])["asked"]
    expected = ["--dataset-id", newest.id, "--model", "phantoms", "--correction-weight", "8"]
    assert asked == ["-m", "medloop_trainer", "retrain", *expected]
