"""The API over HTTP: clear answers to good and bad input, and a running service that follows its champion."""

import asyncio
import hashlib
import re
import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from medloop.bundle import Bundle
from medloop.errors import Overloaded
from medloop.registry import CHAMPION, Registry
from medloop.schemas import Correction, Prediction, PredictionBatch, ServedModel, new_id
from medloop.settings import ServerSettings, StorageSettings
from medloop.storage.objects import ObjectStore
from medloop.testing import asgi_client, live_server, tiny_probabilities
from medloop.vision.encode import encode_png
from medloop.vision.golden import awkward_images
from medloop.vision.prepare import prepare
from medloop_inference.app import create_app
from medloop_inference.metrics import DEGRADED
from medloop_inference.service import Service
from medloop_inference.settings import QueueSettings, ServingSettings, Settings
from prometheus_client import generate_latest

pytestmark = pytest.mark.anyio

Evaluator = Any  # the small one of conftest.py
Grey = Callable[..., bytes]
REPOSITORY = Path(__file__).parents[2]
PNG = {"content-type": "image/png"}
JPEG = awkward_images(64)[1]


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, pixels: bytes = b"") -> bytes:
    """A PNG that announces a grey image of a size, and holds `pixels` whatever that size is."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(pixels)) + png_chunk(b"IEND", b"")


def problem_of(response: httpx.Response) -> dict[str, Any]:
    """The problem document, after checking what all of them have."""
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert document["status"] == response.status_code
    assert document["request_id"] == response.headers["x-request-id"]
    assert document["type"].endswith(document["code"])
    return document


@pytest.fixture
async def serving(
    client: httpx.AsyncClient, service: Service, evaluator: Evaluator, first: Bundle
) -> httpx.AsyncClient:
    """A client of a service that answers with `first`."""
    evaluator.champion(first)
    service.watcher.poll_once()
    return client


async def test_without_a_champion_it_lives_and_says_what_to_do(
    client: httpx.AsyncClient, service: Service, grey: Grey
) -> None:
    service.watcher.poll_once()
    assert (await client.get("/livez")).status_code == 200
    ready = await client.get("/readyz")
    assert (ready.status_code, ready.json()["reason"]) == (503, "no approved champion yet")
    refusal = await client.post("/v1/predict", content=grey(0), headers=PNG)
    assert refusal.status_code == 503
    assert problem_of(refusal)["code"] == "no-model"
    assert "medloop approve" in problem_of(refusal)["detail"]
    assert ServedModel.model_validate((await client.get("/v1/model")).json()).model is None


@pytest.mark.parametrize("content_type", ["image/png", "image/jpeg", "application/octet-stream", "IMAGE/PNG; q=1"])
async def test_a_raw_image_is_answered(
    serving: httpx.AsyncClient, first: Bundle, grey: Grey, content_type: str
) -> None:
    image = grey(200)
    response = await serving.post("/v1/predict", content=image, headers={"content-type": content_type})
    assert response.status_code == 200
    answer = Prediction.model_validate(response.json())
    assert list(answer.probabilities.values()) == pytest.approx(
        tiny_probabilities(np.full((16, 16, 1), 200, np.uint8)), abs=1e-6
    )
    assert answer.model.bundle_digest == first.digest
    assert answer.image_hash == hashlib.sha256(image).hexdigest()
    assert (await serving.get("/readyz")).status_code == 200


async def test_many_images_are_answered_or_refused_each_on_its_own(serving: httpx.AsyncClient, grey: Grey) -> None:
    images = [grey(0), b"poison", grey(255), b""]
    files = [("files", (f"{i}.png", image, "image/png")) for i, image in enumerate(images)]
    response = await serving.post("/v1/predict", files=files)
    assert response.status_code == 200
    items = PredictionBatch.model_validate(response.json()).items
    assert [item.index for item in items] == [0, 1, 2, 3]
    assert [item.prediction.label if item.prediction else None for item in items] == ["dark", None, "bright", None]
    problems = [item.problem for item in items if item.problem]
    assert [problem.status for problem in problems] == [415, 422]
    assert {problem.request_id for problem in problems} == {response.headers["x-request-id"]}


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 422, "invalid-image"),
        (b"this is no image", 415, "unsupported-image"),
        (JPEG[: len(JPEG) // 2], 422, "invalid-image"),
        (png(60_000, 60_000), 413, "image-too-large"),
        (png(60_000, 60_000)[:33], 422, "invalid-image"),
        (png(8, 8), 422, "invalid-image"),
        (b"\x89PNG\r\n\x1a\n" + bytes(200), 422, "invalid-image"),
    ],
    ids=[
        "empty",
        "text",
        "truncated JPEG",
        "PNG of 60,000×60,000",
        "its header alone",
        "PNG without pixels",
        "PNG of zeros",
    ],
)
async def test_bad_images_get_their_own_problem(
    serving: httpx.AsyncClient, body: bytes, status: int, code: str
) -> None:
    response = await serving.post("/v1/predict", content=body, headers=PNG)
    assert (response.status_code, problem_of(response)["code"]) == (status, code)


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "application/json", "", "text/plain"])
async def test_another_content_type_is_refused_with_advice(
    serving: httpx.AsyncClient, grey: Grey, content_type: str
) -> None:
    response = await serving.post("/v1/predict", content=grey(0), headers={"content-type": content_type})
    assert response.status_code == 415
    assert "application/octet-stream" in problem_of(response)["detail"]


@pytest.mark.parametrize(
    "body",
    [
        b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\nno file\r\n--x--\r\n",
        b"--x--\r\n",
        b"no multipart at all",
        b"--x\r\nContent-Disposition: form-data; name=f\r\n\r\ncut o",
    ],
    ids=["text field", "no part", "garbage", "cut off"],
)
async def test_a_bad_multipart_is_the_sender_s_fault(serving: httpx.AsyncClient, body: bytes) -> None:
    response = await serving.post(
        "/v1/predict", content=body, headers={"content-type": "multipart/form-data; boundary=x"}
    )
    assert 400 <= response.status_code < 500
    problem_of(response)


async def test_multipart_without_a_boundary_is_the_sender_s_fault(serving: httpx.AsyncClient) -> None:
    response = await serving.post("/v1/predict", content=b"x", headers={"content-type": "multipart/form-data"})
    assert response.status_code == 400
    problem_of(response)


@pytest.mark.parametrize("stated", [True, False], ids=["with its length", "chunked"])
@pytest.mark.parametrize("content_type", ["image/png", "multipart/form-data; boundary=x"])
async def test_a_body_beyond_the_limit_is_refused(
    settings: Settings, evaluator: Evaluator, first: Bundle, stated: bool, content_type: str
) -> None:
    small = Settings(serving=settings.serving, server=ServerSettings(max_body_bytes=1000))
    app = create_app(small)
    evaluator.champion(first)
    body = b'--x\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\n' + bytes(2000) + b"\r\n--x--\r\n"

    async def pieces() -> Any:
        for start in range(0, len(body), 300):
            yield body[start : start + 300]

    async with asgi_client(app) as client:
        app.state.service.watcher.poll_once()
        headers = {"content-type": content_type}
        response = await client.post("/v1/predict", content=body if stated else pieces(), headers=headers)
    assert (response.status_code, problem_of(response)["code"]) == (413, "body-too-large")


async def test_what_is_served_can_be_asked(
    serving: httpx.AsyncClient, service: Service, evaluator: Evaluator, registry: Registry, second: Bundle
) -> None:
    registry.set_alias("tiny", CHAMPION, evaluator.register(second))
    service.watcher.poll_once()
    model = ServedModel.model_validate((await serving.get("/v1/model")).json())
    assert model.model is not None
    assert (model.model.version, model.classes, model.alias) == ("1", ["dark", "bright"], "champion")
    assert model.preparation["size"] == 16
    assert [refused.version for refused in model.refused] == ["2"]
    assert "the approval in force is for version 1" in model.refused[0].reason
    assert model.degraded == {}


async def test_an_approval_changes_the_answers_without_a_restart(
    serving: httpx.AsyncClient, service: Service, evaluator: Evaluator, first: Bundle, second: Bundle, grey: Grey
) -> None:
    async def ask() -> tuple[str, str]:
        answer = Prediction.model_validate((await serving.post("/v1/predict", content=grey(150), headers=PNG)).json())
        return answer.model.version, answer.label

    assert await ask() == ("1", "bright")
    evaluator.champion(second)
    service.watcher.poll_once()
    assert await ask() == ("2", "dark")
    evaluator.approve("1", first)
    service.watcher.poll_once()
    assert await ask() == ("1", "bright")


async def test_the_running_service_finds_an_approval_by_itself(
    settings: Settings, evaluator: Evaluator, first: Bundle, grey: Grey
) -> None:
    quick = Settings(serving=ServingSettings(model="tiny", poll_seconds=0.05, engine_threads=1))
    async with asgi_client(create_app(quick)) as client:
        evaluator.champion(first)
        for _ in range(600):
            if (await client.get("/readyz")).status_code == 200:
                break
            await asyncio.sleep(0.05)
        assert (await client.post("/v1/predict", content=grey(0), headers=PNG)).status_code == 200


def _correction(image: bytes | None, **fields: str) -> dict[str, Any]:
    given = {"label": "bright", "author": "Dr. Test"} | fields
    return {"data": given, "files": {"image": ("x.png", image, "image/png")} if image is not None else None}


async def test_a_prediction_is_recorded_and_can_be_corrected(
    serving: httpx.AsyncClient, service: Service, objects: ObjectStore, grey: Grey
) -> None:
    image = grey(20)
    sent = await serving.post("/v1/predict", content=image, headers={**PNG, "x-request-id": "mine"})
    answer = Prediction.model_validate(sent.json())
    service.recorder.stop()
    assert [Prediction.model_validate(p) for p in (await serving.get("/v1/predictions")).json()] == [answer]
    assert service.records.get("predictions", answer.id).document["request_id"] == "mine"  # type: ignore[union-attr]

    url = f"/v1/predictions/{answer.id}/correction"
    responses = [await serving.post(url, **_correction(image, comment="clearly")) for _ in range(2)]
    assert [response.status_code for response in responses] == [201, 200]
    correction = Correction.model_validate(responses[0].json())
    assert responses[1].json() == responses[0].json()
    assert (correction.predicted_label, correction.label, correction.comment) == ("dark", "bright", "clearly")
    assert correction.version == "1"
    assert objects.exists(f"images/{correction.image_hash[:2]}/{correction.image_hash}")
    listed = (await serving.get("/v1/corrections", params={"status": "pending", "limit": 5})).json()
    assert [Correction.model_validate(each) for each in listed] == [correction]
    assert (await serving.get("/v1/corrections", params={"status": "accepted"})).json() == []


@pytest.mark.parametrize(
    ("prediction", "fields", "status", "says"),
    [
        ("not-an-id", {}, 422, "prediction_id"),
        ("4f0b8a52-95a5-4f43-9d44-6e8d1b9a3c11", {}, 422, "prediction_id"),
        (None, {"label": "grey"}, 422, "choose one of: dark, bright"),
        (None, {"label": ""}, 422, "label"),
        (None, {"author": "  "}, 422, "author"),
        (None, {"comment": "x" * 3000}, 422, "comment"),
    ],
    ids=["no id", "UUIDv4", "unknown label", "no label", "no author", "long comment"],
)
async def test_bad_corrections_are_refused_and_not_stored(
    serving: httpx.AsyncClient, grey: Grey, prediction: str | None, fields: dict[str, str], status: int, says: str
) -> None:
    url = f"/v1/predictions/{prediction or new_id()}/correction"
    response = await serving.post(url, **_correction(grey(0), **fields))
    assert response.status_code == status
    assert says in problem_of(response)["detail"]
    assert (await serving.get("/v1/corrections")).json() == []


async def test_without_a_champion_any_label_is_taken(client: httpx.AsyncClient, grey: Grey) -> None:
    response = await client.post(f"/v1/predictions/{new_id()}/correction", **_correction(grey(0), label="grey"))
    assert response.status_code == 201  # nobody knows the classes, and the label must not be lost


async def test_a_correction_without_an_image_says_that_one_is_needed(serving: httpx.AsyncClient) -> None:
    response = await serving.post(f"/v1/predictions/{new_id()}/correction", **_correction(None))
    assert response.status_code == 400
    assert "send it with the correction" in problem_of(response)["detail"]


async def test_records_being_down_stops_no_prediction_and_claims_no_correction(
    settings: Settings, evaluator: Evaluator, first: Bundle, grey: Grey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "blocked.sqlite"
    blocked.mkdir()
    monkeypatch.setenv("MEDLOOP_RECORDS_URL", f"sqlite:///{blocked}")
    app = create_app(Settings(serving=settings.serving, storage=StorageSettings()))
    evaluator.champion(first)
    async with asgi_client(app) as client:
        service: Service = app.state.service
        service.watcher.poll_once()
        sent = await client.post("/v1/predict", content=grey(0), headers=PNG)
        assert sent.status_code == 200
        url = f"/v1/predictions/{sent.json()['id']}/correction"
        refused = await client.post(url, **_correction(grey(0)))
        assert (refused.status_code, problem_of(refused)["code"]) == (503, "storage-unavailable")
        service.neighbours.check_once()
        degraded = (await client.get("/v1/model")).json()["degraded"]
        assert list(degraded) == ["records"]
        assert (await client.get("/readyz")).status_code == 200


async def test_a_record_of_another_release_hides_no_other(
    serving: httpx.AsyncClient, service: Service, grey: Grey, caplog: pytest.LogCaptureFixture
) -> None:
    service.records.put_once("predictions", "0192f0c1-2345-7000-8000-000000000000", {"model": {"name": "tiny"}})
    answer = Prediction.model_validate((await serving.post("/v1/predict", content=grey(9), headers=PNG)).json())
    service.recorder.stop()
    listed = (await serving.get("/v1/predictions")).json()
    assert [each["id"] for each in listed] == [answer.id]
    assert "cannot be read" in caplog.text


async def test_a_frame_that_no_file_has_is_the_sender_s_fault(serving: httpx.AsyncClient, grey: Grey) -> None:
    sent = await serving.post("/v1/predict", content=grey(9), headers=PNG)
    url = f"/v1/predictions/{sent.json()['id']}/correction"
    for frame in ("0", str(2**40), "x"):
        assert (await serving.post(url, **_correction(grey(9), frame=frame))).status_code == 422
        asked = await serving.post("/v1/predict", content=grey(9), headers=PNG, params={"frame": frame})
        assert asked.status_code == 400


async def test_metrics_count_answers_refusals_and_losses(serving: httpx.AsyncClient, first: Bundle, grey: Grey) -> None:
    await serving.post("/v1/predict", content=grey(0), headers=PNG)
    await serving.post("/v1/predict", content=b"", headers=PNG)
    text = (await serving.get("/metrics")).text
    assert 'medloop_predictions_total{decision="accept",version="1"} 1.0' in text
    assert 'medloop_image_refusals_total{code="invalid-image"} 1.0' in text
    assert 'medloop_stage_seconds_count{stage="network"} 1.0' in text
    assert f'bundle_digest="{first.digest}"' in text
    for name in ("records_dropped", "spool_torn", "spool_damaged", "spool_removed"):
        assert f"medloop_{name}_total 0.0" in text
    assert re.search(r"^process_resident_memory_bytes \d", text, re.MULTILINE) or sys.platform != "linux"
    assert re.search(r"^medloop_tracking_age_seconds \d", text, re.MULTILINE)


async def test_metrics_tell_what_is_degraded_and_when_it_is_over(
    serving: httpx.AsyncClient, service: Service, evaluator: Evaluator, registry: Registry, second: Bundle
) -> None:
    async def degraded() -> set[str]:
        text = (await serving.get("/metrics")).text
        told = dict(re.findall(r'^medloop_degraded\{what="(.*)"\} (.*)$', text, re.MULTILINE))
        assert set(told) == set(DEGRADED)
        return {what for what, value in told.items() if value == "1.0"}

    assert await degraded() == set()
    version = evaluator.register(second)
    registry.set_alias("tiny", CHAMPION, version)
    service.watcher.poll_once()
    assert await degraded() == {"champion-refused"}
    evaluator.approve(version, second)
    service.watcher.poll_once()
    assert await degraded() == set()
    registry.delete_alias("tiny", CHAMPION)
    service.watcher.poll_once()
    assert await degraded() == {"champion"}


def test_who_is_turned_away_at_the_door_is_counted(service: Service, app: FastAPI) -> None:
    service.check_door()
    service.predictor.admission.images = 100_000
    with pytest.raises(Overloaded):
        service.check_door()
    assert 'medloop_door_refusals_total{code="overloaded"} 1.0' in generate_latest(app.state.metrics).decode()


def test_the_guide_names_every_metric_and_no_other(home: Path, tracking_uri: str) -> None:
    app = create_app(Settings(serving=ServingSettings(model="tiny", shadow_share=1.0)))
    text = generate_latest(app.state.metrics).decode()
    told = set(re.findall(r"^# TYPE (medloop_\w+?)(?<!_created) ", text, re.MULTILINE))
    guide = (REPOSITORY / "docs" / "metrics.md").read_text()
    assert told == set(re.findall(r"\bmedloop_\w+", guide))
    whats = guide.partition("| `what` |")[2].partition("\n\n")[0]
    assert set(DEGRADED) == set(re.findall(r"`([a-z-]+)`", re.sub(r"\|[^|]*\|\n", "|\n", whats)))


def test_a_shadow_s_figures_are_told(home: Path, tracking_uri: str) -> None:
    app = create_app(Settings(serving=ServingSettings(model="tiny", shadow_share=1.0)))
    text = generate_latest(app.state.metrics).decode()
    for name in ("compared", "skipped", "disagreements"):
        assert f"medloop_shadow_{name}_total 0.0" in text


async def test_a_document_describes_every_route(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    assert "/v1/predict" in document["paths"]
    body = document["paths"]["/v1/predict"]["post"]["requestBody"]["content"]
    assert set(body) == {"image/*", "application/dicom", "application/octet-stream", "multipart/form-data"}


def test_with_200_distinct_images_in_flight_every_answer_belongs_to_its_image(
    settings: Settings, evaluator: Evaluator, first: Bundle
) -> None:
    app = create_app(replace(settings, queue=QueueSettings(target_ms=60_000)))  # a cold start, and all at once
    service: Service = app.state.service
    rng = np.random.default_rng(5)
    images = [encode_png(rng.integers(0, 256, (16, 16), np.uint8) // np.uint8(i % 5 + 1)) for i in range(200)]
    evaluator.champion(first)

    async def ask_all(url: str) -> list[Prediction]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            responses = await asyncio.gather(
                *(client.post("/v1/predict", content=image, headers=PNG) for image in images)
            )
        return [Prediction.model_validate(response.json()) for response in responses]

    with live_server(app) as url:
        service.watcher.poll_once()
        answers = asyncio.run(ask_all(url))

    for image, answer in zip(images, answers, strict=True):
        assert answer.image_hash == hashlib.sha256(image).hexdigest()
        truth = tiny_probabilities(prepare(image, first.card.preparation))
        assert list(answer.probabilities.values()) == pytest.approx(truth, abs=1e-6)
    assert len({tuple(answer.probabilities.values()) for answer in answers}) > 150
