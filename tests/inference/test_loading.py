"""What answers is what the version means, or an engine that was asked for and checked: never anything unnamed."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from medloop.bundle import GOLDEN, Bundle, Golden, Outputs, Pixels, write_card
from medloop.engines.onnxruntime import OnnxRuntimeNetwork
from medloop.errors import InvalidRequest, StorageUnavailable, UntrustedModel
from medloop.http import run
from medloop.registry import CHAMPION, TAG_APPROVAL
from medloop.schemas import EngineCheck
from medloop.settings import HomeSettings
from medloop.testing import FolderRegistry, tiny_bundle
from medloop_inference.app import create_app
from medloop_inference.champion import RECHECK_SECONDS, Watcher
from medloop_inference.loading import Wanted, open_wanted, warm_up
from medloop_inference.settings import Settings

Evaluator = Any  # the small one of conftest.py
CHECK = EngineCheck(
    engine="openvino", precision="float32", source="calibration", images=100, max_difference=1e-6, agreement=1.0
)


@dataclass
class Checks:
    """What the evaluator has checked: bundle digests."""

    digests: set[str] = field(default_factory=set)
    down: bool = False

    def find(self, version: str, digest: str) -> EngineCheck | None:
        if self.down:
            raise StorageUnavailable("Records are down.")
        return CHECK if digest in self.digests else None

    @property
    def wanted(self) -> Wanted:
        return Wanted("openvino", "float32", find_check=self.find)


class Noting(OnnxRuntimeNetwork):
    """Notes how many images it was given at once."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        self.sizes: list[int] = []

    def run(self, images: Pixels) -> Outputs:
        self.sizes.append(len(images))
        return super().run(images)


def test_warming_up_runs_batches_of_every_order_up_to_the_largest(first: Bundle) -> None:
    network = Noting(first)
    warm_up(network, largest_batch=6)
    assert network.sizes == [1, 2, 4, 6]


@pytest.mark.parametrize("down", [False, True])
def test_an_engine_that_nobody_checked_does_not_answer(first: Bundle, down: bool) -> None:
    opened = open_wanted(first, "7", Checks(down=down).wanted)
    assert (opened.network.engine, opened.network.precision, opened.checks) == ("onnxruntime", "float32", ())
    said = "Version 7 answers in float32 on onnxruntime instead of float32 on openvino: "
    assert opened.doubt is not None
    assert opened.doubt.startswith(said)
    assert opened.doubt.endswith("Records are down." if down else "have the evaluator check it first.")


def test_an_engine_that_is_not_offered_does_not_answer(first: Bundle) -> None:
    opened = open_wanted(first, "7", Wanted("abacus", "float32", find_check=lambda version, digest: CHECK))
    assert opened.network.engine == "onnxruntime"
    assert "abacus" in (opened.doubt or "")


@pytest.mark.parametrize(
    ("engine", "precision", "said"),
    [("openvino", "float32", "extra openvino"), ("onnxruntime", "bfloat16", "There is no bfloat16 on onnxruntime")],
)
def test_settings_that_nothing_could_be_served_with_end_the_start_in_one_sentence(
    home: Path,
    tracking_uri: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    engine: str,
    precision: str,
    said: str,
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    for name, value in {"MODEL": "tiny", "ENGINE": engine, "PRECISION": precision}.items():
        monkeypatch.setenv(f"MEDLOOP_{name}", value)
    assert run("inference", Settings, create_app) == InvalidRequest.exit_status == 3
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.count("\n") == 1


def test_a_checked_engine_answers_and_shows_what_it_was_checked_against(first: Bundle) -> None:
    pytest.importorskip("openvino")
    opened = open_wanted(first, "7", Checks({first.digest}).wanted)
    assert (opened.network.engine, opened.doubt) == ("openvino", None)
    assert [check.source for check in opened.checks] == ["golden", "calibration"]
    image = np.full((1, 16, 16, 1), 150, np.uint8)
    expected = OnnxRuntimeNetwork(first).run(image).probabilities
    assert np.abs(opened.network.run(image).probabilities - expected).max() < 1e-3


def test_a_bundle_that_answers_otherwise_is_refused_on_every_engine(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "wrong", model="tiny")
    golden = bundle.golden
    Golden(golden.encoded, golden.pixels, golden.prepared, golden.probabilities[::-1]).save(bundle.folder / GOLDEN)
    bundle = write_card(bundle.folder, bundle.card)
    with pytest.raises(UntrustedModel, match="golden inputs are off"):
        open_wanted(bundle, "7", Checks({bundle.digest}).wanted)


def test_the_wanted_engine_takes_over_once_it_was_checked(
    home: Path, evaluator: Evaluator, clock: Any, first: Bundle, second: Bundle
) -> None:
    pytest.importorskip("openvino")
    shelf, checks = FolderRegistry(), Checks()
    watcher = Watcher("tiny", shelf, HomeSettings(), wanted=checks.wanted, clock=clock)
    for bundle in (first, second):
        approval = evaluator.sign(shelf.add(bundle), bundle)
        shelf.tags[TAG_APPROVAL], shelf.aliases[CHAMPION] = approval.model_dump_json(), approval.version
        watcher.poll_once()
    assert watcher.served().ref.engine == "onnxruntime"
    assert "instead of float32 on openvino" in watcher.degraded["engine"]
    checks.digests.add(second.digest)
    watcher.poll_once()
    assert watcher.served().ref.engine == "onnxruntime"  # it does not ask records at every poll
    clock.now += RECHECK_SECONDS
    watcher.poll_once()
    found = watcher.describe()
    assert found.model is not None
    assert (found.model.version, found.model.engine, found.degraded) == ("2", "openvino", {})
    assert [check.source for check in found.checks] == ["golden", "calibration"]
    assert watcher.served().network.engine == "openvino"
