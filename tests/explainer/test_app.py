"""The API with a real exported network: one image, a set, and what is refused."""

import asyncio
import base64
import csv
import io
import shutil
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from medloop.bundle import Bundle
from medloop.data.manifest import Manifest
from medloop.engines import open_network
from medloop.registry import CHAMPION, TAG_DIGEST, Registry, Version
from medloop.schemas import Explanation, ExplanationIndex
from medloop.storage.objects import ObjectStore
from medloop.testing import asgi_client
from medloop.vision.decode import decode
from medloop.vision.encode import encode_png
from medloop.vision.phantoms import CLASSES as PHANTOMS
from medloop.vision.phantoms import phantom
from medloop.vision.prepare import prepare
from medloop_explainer.app import IN_HAND, create_app
from medloop_explainer.settings import ExplainerSettings

pytestmark = pytest.mark.anyio

CLASSES = PHANTOMS[:3]
IMAGE = encode_png(phantom(CLASSES[1], 77, 0, 40))
ONE = {"model": "phantoms", "version": "1"}


async def explain(client: httpx.AsyncClient, data: bytes = IMAGE, **params: str) -> httpx.Response:
    headers = {"content-type": "image/png"}
    return await client.post("/explain", content=data, params={"model": "phantoms", **params}, headers=headers)


async def explain_set(client: httpx.AsyncClient, **body: object) -> dict[str, object]:
    answer = await client.post("/explanations", json={**ONE, **body})
    assert answer.status_code == 202, answer.text
    job: dict[str, object] = answer.json()
    for _ in range(1200):
        if job["status"] in ("succeeded", "failed"):
            return job
        await asyncio.sleep(0.05)
        job = (await client.get(f"/jobs/{job['id']}")).json()
    raise TimeoutError("the explanations did not end")


async def test_one_image_is_explained_with_its_quality(
    client: httpx.AsyncClient, version: Version, dataset: Manifest, exported: Bundle
) -> None:
    answer = await explain(client, version="1")
    assert answer.status_code == 200, answer.text
    found = Explanation.model_validate(answer.json())
    served = open_network(exported).run(prepare(IMAGE, exported.card.preparation)[None]).probabilities[0]
    assert found.target == CLASSES[int(served.argmax())]
    assert found.probability == pytest.approx(float(served.max()), abs=1e-4)
    assert (found.model.version, found.model.engine) == ("1", "torch")
    assert [attribution.method for attribution in found.attributions] == ["integrated-gradients", "shap"]
    for attribution in found.attributions:
        assert np.array(attribution.values).shape == (32, 32)
        assert np.abs(attribution.values).max() > 0
        assert decode(base64.b64decode(attribution.overlay)).pixels.shape == (256, 256, 3)
        quality = attribution.quality
        assert 0 <= quality["deletion"] <= 1
        assert quality["faithfulness"] == pytest.approx(quality["random_deletion"] - quality["deletion"])
    integrated, shap = (attribution.quality for attribution in found.attributions)
    assert integrated["completeness_gap"] < 0.02
    assert shap["background_images"] == 9


async def test_the_champion_is_explained_unless_a_version_is_named(
    client: httpx.AsyncClient, version: Version, dataset: Manifest, registry: Registry
) -> None:
    nobody = await explain(client, methods="integrated-gradients")
    assert (nobody.status_code, nobody.json()["code"]) == (503, "no-model")
    registry.set_alias("phantoms", CHAMPION, "1")
    answer = await explain(client, methods="integrated-gradients")
    assert answer.json()["model"]["version"] == "1"
    assert [attribution["method"] for attribution in answer.json()["attributions"]] == ["integrated-gradients"]


async def test_any_class_can_be_asked_about(client: httpx.AsyncClient, version: Version, dataset: Manifest) -> None:
    answers = [
        (await explain(client, version="1", target=label, methods="integrated-gradients")).json() for label in CLASSES
    ]
    assert [answer["target"] for answer in answers] == list(CLASSES)
    assert sum(answer["probability"] for answer in answers) == pytest.approx(1, abs=1e-5)
    values = np.array([answer["attributions"][0]["values"] for answer in answers])
    # What speaks for one class speaks against the others: probabilities sum to one, so attributions sum to nothing.
    assert np.abs(values.sum(axis=0)).max() < 0.02 * np.abs(values).max() + 1e-5


@pytest.mark.parametrize(
    ("data", "params", "status", "code"),
    [
        (b"no image", {}, 415, "unsupported-image"),
        (b"", {}, 422, "invalid-image"),
        (IMAGE[:200], {}, 422, "invalid-image"),
        (IMAGE, {"target": "left foot"}, 400, "invalid-request"),
        (IMAGE, {"methods": "tea-leaves"}, 400, "invalid-request"),
        (IMAGE, {"version": "9"}, 404, "not-found"),
    ],
)
async def test_what_cannot_be_explained_is_refused(
    client: httpx.AsyncClient,
    version: Version,
    dataset: Manifest,
    data: bytes,
    params: dict[str, str],
    status: int,
    code: str,
) -> None:
    answer = await explain(client, data, **({"version": "1"} | params))
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text


async def test_an_unknown_class_is_answered_with_the_known_ones(
    client: httpx.AsyncClient, version: Version, dataset: Manifest
) -> None:
    detail = (await explain(client, version="1", target="left foot")).json()["detail"]
    assert all(label in detail for label in CLASSES)


async def test_without_objects_an_image_is_explained_all_the_same(
    client: httpx.AsyncClient, version: Version, dataset: Manifest, home: Path
) -> None:
    shutil.rmtree(home / "objects")
    answer = await explain(client, version="1")
    assert answer.status_code == 200, answer.text
    assert answer.json()["attributions"][1]["quality"]["background_images"] == 0
    assert answer.json()["attributions"][1]["quality"]["completeness_gap"] < 0.1


@pytest.mark.usefixtures("version", "hanging_s3")
async def test_objects_that_hang_hold_no_explanation_up() -> None:
    async with asgi_client(create_app(ExplainerSettings())) as client:
        began = time.monotonic()
        answer = await explain(client, version="1", methods="shap")
        assert time.monotonic() - began < 100  # S3 alone would be waited for two minutes
    assert answer.status_code == 200, answer.text
    assert answer.json()["attributions"][0]["quality"]["background_images"] == 0


async def test_a_set_is_patient_about_its_background_too(
    home: Path,
    tracking_uri: str,
    version: Version,
    dataset: Manifest,
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MEDLOOP_OBJECTS_SECONDS", "1e-9")  # too little for any answer
    async with asgi_client(create_app(ExplainerSettings())) as impatient:
        job = await explain_set(impatient, rows=[5])
    assert job["status"] == "succeeded", job
    folder = Path(registry.client.download_artifacts(version.run_id, "explanations"))
    index = ExplanationIndex.model_validate_json((folder / "index.json").read_bytes())
    assert index.quality["shap"]["background_images"] == 9


async def test_the_background_outlives_objects(
    client: httpx.AsyncClient, version: Version, dataset: Manifest, home: Path
) -> None:
    before = (await explain(client, version="1", methods="shap")).json()["attributions"][0]
    shutil.rmtree(home / "objects")
    async with asgi_client(create_app(ExplainerSettings())) as another:
        after = (await explain(another, version="1", methods="shap")).json()["attributions"][0]
    assert after["quality"]["background_images"] == 9
    assert after["values"] == before["values"]


async def test_one_too_many_is_refused_early(client: httpx.AsyncClient, version: Version, dataset: Manifest) -> None:
    answers = await asyncio.gather(
        *(explain(client, version="1", methods="integrated-gradients") for _ in range(IN_HAND + 3))
    )
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) == 3
    assert all(int(answer.headers["retry-after"]) > 0 for answer in refused)
    assert sum(answer.status_code == 200 for answer in answers) == IN_HAND
    assert (await explain(client, version="1", methods="integrated-gradients")).status_code == 200


async def test_a_set_leaves_overlays_values_and_an_index(
    client: httpx.AsyncClient, version: Version, dataset: Manifest, registry: Registry, objects: ObjectStore
) -> None:
    job = await explain_set(client, images=4)
    assert job["status"] == "succeeded", job
    folder = Path(registry.client.download_artifacts(version.run_id, "explanations"))
    index = ExplanationIndex.model_validate_json((folder / "index.json").read_bytes())
    assert job["result"]["images"] == len(index.images) == 4  # type: ignore[index]
    assert job["result"]["quality"] == index.quality  # type: ignore[index]
    assert {image.label for image in index.images} == set(CLASSES)
    rows = [dataset.rows[image.row] for image in index.images]
    assert all(row.split == "test" for row in rows)
    assert [row.byte_hash for row in rows] == [image.image_hash for image in index.images]
    for number, image in enumerate(index.images):
        stem = f"{number:02d}_{image.label}_{image.predicted}"
        assert image.original == f"{stem}_original.png"
        assert [by.overlay for by in image.attributions] == [f"{stem}_ig.png", f"{stem}_shap.png"]
        assert all((folder / by.overlay).is_file() for by in image.attributions)
        assert (folder / image.original).is_file()
    with np.load(folder / "values.npz", allow_pickle=False) as arrays:
        assert arrays["rows"].tolist() == [image.row for image in index.images]
        assert arrays["integrated_gradients"].shape == arrays["shap"].shape == (4, 32, 32)
    table = list(csv.DictReader(io.StringIO((folder / "summary.csv").read_text())))
    assert len(table) == 8
    assert float(table[0]["deletion"]) == index.images[0].attributions[0].quality["deletion"]
    again = await client.post("/explanations", json={**ONE, "images": 4})
    assert again.json()["id"] == job["id"]


async def test_a_set_that_was_lost_or_is_of_another_bundle_is_made_anew(
    client: httpx.AsyncClient, version: Version, dataset: Manifest, registry: Registry, tmp_path: Path
) -> None:
    first = await explain_set(client, rows=[5])
    index = next(tmp_path.glob("mlruns/**/explanations/index.json"))
    index.unlink()
    second = await explain_set(client, rows=[5])
    assert (second["status"], second["id"] != first["id"]) == ("succeeded", True)
    assert index.is_file()
    assert (await explain_set(client, rows=[5]))["id"] in (first["id"], second["id"])  # nothing is missing now
    registry.set_tag("phantoms", "1", TAG_DIGEST, "0" * 64)  # as if the number had come to mean another bundle
    assert (await explain_set(client, rows=[5]))["id"] not in (first["id"], second["id"])


async def test_a_set_of_named_rows_and_of_rows_that_are_not_there(
    client: httpx.AsyncClient, version: Version, dataset: Manifest, registry: Registry
) -> None:
    job = await explain_set(client, rows=[5])
    assert job["status"] == "succeeded", job
    failed = await explain_set(client, rows=[5, 999])
    assert failed["status"] == "failed"
    assert failed["problem"]["code"] == "invalid-request"  # type: ignore[index]
    assert "0 to 35" in failed["problem"]["detail"]  # type: ignore[index]
    assert (await client.post("/explanations", json={**ONE, "version": "7"})).status_code == 404


async def test_a_changed_bundle_is_not_explained(
    client: httpx.AsyncClient, version: Version, dataset: Manifest, tmp_path: Path
) -> None:
    weights = next(tmp_path.glob("mlruns/**/bundle/weights.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    answer = await explain(client, version="1")
    assert (answer.status_code, answer.json()["code"]) == (409, "untrusted-model")


async def test_it_is_alive_at_once_and_ready_when_warm(client: httpx.AsyncClient) -> None:
    assert (await client.get("/livez")).status_code == 200
    for _ in range(1200):
        if (answer := await client.get("/readyz")).status_code == 200:
            break
        await asyncio.sleep(0.05)
    assert answer.json() == {"status": "ready"}


async def test_no_job_is_begun_once_the_service_drains(home: Path, tracking_uri: str) -> None:
    app = create_app(ExplainerSettings())
    before = set(threading.enumerate())
    async with asgi_client(app):
        (worker,) = (each for each in set(threading.enumerate()) - before if each.name.startswith("jobs-"))
        app.readiness.drain()
        await asyncio.to_thread(worker.join, 30)
        assert not worker.is_alive()
