"""The check on the calibration split: real answers of both engines, judged, kept, and found again by inference."""

import asyncio
from collections.abc import Callable

import httpx
import numpy as np
import pytest
from medloop.bundle import Bundle, Outputs, Pixels
from medloop.data.manifest import Manifest
from medloop.engines import Network, check_offered
from medloop.engines.checks import VERDICTS, find_check, judge
from medloop.errors import InvalidRequest
from medloop.registry import TAG_DIGEST, Version
from medloop.schemas import EngineVerdict
from medloop.storage.records import RecordStore
from medloop.testing import tiny_bundle, tiny_network
from medloop_evaluator.engines import compare_networks

pytestmark = pytest.mark.anyio

MODEL = "tiny"
RegisterVersion = Callable[..., Version]


@pytest.fixture
def openvino() -> None:
    try:
        check_offered("openvino", "float32")
    except InvalidRequest as exc:
        pytest.skip(exc.detail)


async def check(client: httpx.AsyncClient, engine: str, precision: str) -> httpx.Response:
    body = {"model": MODEL, "version": "1", "engine": engine, "precision": precision}
    return await client.post("/engines/check", json=body)


@pytest.mark.usefixtures("openvino")
async def test_a_check_on_the_calibration_split_is_kept_and_found_again(
    client: httpx.AsyncClient, register: RegisterVersion, dataset: Manifest, records: RecordStore
) -> None:
    version = register()
    answer = await check(client, "openvino", "float32")
    assert answer.status_code == 202, answer.text
    job = answer.json()
    async with asyncio.timeout(60):
        while job["status"] not in ("succeeded", "failed"):
            await asyncio.sleep(0.05)
            job = (await client.get(f"/jobs/{job['id']}")).json()
    assert job["status"] == "succeeded", job
    verdict = EngineVerdict.model_validate(job["result"])
    assert verdict.passed
    assert verdict.check.images == sum(row.split == "calibration" for row in dataset.rows)
    assert verdict.check.max_difference <= 1e-5
    assert verdict.check.speedup is not None
    digest = version.tags[TAG_DIGEST]
    assert find_check(records, MODEL, "1", digest, "openvino", "float32") == verdict.check
    assert find_check(records, MODEL, "1", digest, "openvino", "bfloat16") is None
    assert (await check(client, "openvino", "float32")).json()["id"] == job["id"]
    assert len(records.find(VERDICTS, {"model": MODEL}).items) == 1


async def test_what_cannot_be_checked_is_told_at_once(client: httpx.AsyncClient, register: RegisterVersion) -> None:
    register()
    for engine, precision in (("tensorrt", "float32"), ("openvino", "int8"), ("onnxruntime", "float32")):
        answer = await check(client, engine, precision)
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid-request"), answer.text


class Shifted(Network):
    """The tiny network, off by `shift` in every probability, and thus with other labels where it is unsure."""

    engine = "shifted"

    def __init__(self, bundle: Bundle, inner: Network, shift: float) -> None:
        super().__init__(bundle, "bfloat16", 1)
        self._inner, self._shift = inner, np.array([shift, -shift], np.float32)

    def run(self, images: Pixels) -> Outputs:
        outputs = self._inner.run(images)
        return Outputs(outputs.probabilities + self._shift, outputs.embedding, None)


def test_differences_and_changed_labels_fail_the_check(tmp_path_factory: pytest.TempPathFactory) -> None:
    bundle = tiny_bundle(tmp_path_factory.mktemp("bundle"))
    network = tiny_network(tmp_path_factory.mktemp("network"))
    levels = np.linspace(120, 135, 16).astype(np.uint8)
    images = np.broadcast_to(levels[:, None, None, None], (16, 16, 16, 1)).copy()
    told: list[tuple[str, int, int]] = []

    def compared(shift: float) -> tuple[float, float, str | None]:
        batches = iter([images[:10], images[10:]])
        found = compare_networks(network, Shifted(bundle, network, shift), batches, 16, lambda *step: told.append(step))
        assert found.images == 16
        return found.max_difference, found.agreement, judge(found)

    assert compared(0.0) == (0.0, 1.0, None)
    difference, agreement, reason = compared(0.009)
    assert difference == pytest.approx(0.009, abs=1e-6)
    assert agreement < 0.999
    assert "keep their label" in (reason or "")
    assert "differ by up to 2.0e-02" in (compared(0.02)[2] or "")
    assert told[:2] == [("compare", 10, 16), ("compare", 16, 16)]
