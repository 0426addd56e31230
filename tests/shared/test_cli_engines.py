import json
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter
from medloop.engines.bench import BATCHES
from medloop.http import Readiness, create_app
from medloop.registry import CHAMPION, Registry
from medloop.schemas import EngineCheck, EngineCheckCreate, EngineVerdict, JobPublic, now
from medloop.settings import ServerSettings
from medloop.testing import live_server, register_bundle, tiny_bundle


def test_engines_are_measured_beside_each_other_and_the_missing_named(
    medloop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_bundle(tmp_path / "bundle")
    status, out, _ = medloop("bench-engines", "--bundle", str(tmp_path / "bundle"), "--seconds", "0.1", "--json")
    assert status == 0
    found = json.loads(out)
    first = found["measurements"][0]
    assert (first["engine"], first["precision"], first["threads"], first["batch"]) == ("onnxruntime", "float32", 1, 1)
    assert [one["batch"] for one in found["measurements"][: len(BATCHES)]] == list(BATCHES)
    for one in found["measurements"]:
        assert one["images_per_second"] > 0
        assert 0 < one["p50_ms"] <= one["p99_ms"]
        assert one["max_difference"] <= (1e-2 if one["precision"] == "bfloat16" else 1e-5)

    monkeypatch.setitem(sys.modules, "openvino", None)
    _, text, said = medloop("bench-engines", "--bundle", str(tmp_path / "bundle"), "--seconds", "0.1")
    assert "openvino" not in text
    assert "extra openvino" in " ".join(said.split())


@pytest.mark.parametrize(("passed", "status"), [(True, 0), (False, 8)])
def test_a_check_ends_with_the_evaluators_verdict(
    medloop: Any, monkeypatch: pytest.MonkeyPatch, registry: Registry, tmp_path: Path, passed: bool, status: int
) -> None:
    version = register_bundle(registry, tiny_bundle(tmp_path / "bundle"))
    registry.set_alias("tiny", CHAMPION, version.version)
    router = APIRouter()

    @router.post("/engines/check")
    def check(request: EngineCheckCreate) -> JobPublic:
        found = EngineCheck(
            engine=request.engine,
            precision=request.precision,
            source="calibration",
            images=120,
            max_difference=0.004,
            agreement=1.0,
            speedup=1.9,
        )
        verdict = EngineVerdict(
            **request.model_dump(include={"model", "version"}),
            bundle_digest="d",
            dataset_id="d",
            engine_version="1",
            cpu="any",
            check=found,
            passed=passed,
            reason="" if passed else "Too far off.",
        )
        result = verdict.model_dump(mode="json")
        return JobPublic(
            id="1", type="engine-check", status="succeeded", result=result, created_at=now(), updated_at=now()
        )

    app = create_app("fake", ServerSettings(), routers=[router], readiness=Readiness())
    with live_server(app) as address:
        monkeypatch.setenv("MEDLOOP_EVALUATOR_URL", address)
        ended, out, _ = medloop("check-engine", "tiny", "--engine", "openvino", "--precision", "bfloat16")
    assert ended == status
    words = " ".join(out.split())
    assert "tiny version 1 in bfloat16 on openvino, 120 calibration images" in words
    assert "fewer than 2.47% change, with 95 % confidence" in words
    assert ("It may be used." if passed else "It may not be used: Too far off.") in words
