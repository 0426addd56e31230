"""The scoring protocol of MLflow and the container contract of SageMaker, as their own clients use them."""

import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest
from medloop.bundle import Bundle
from medloop.http import App
from medloop.schemas import Prediction
from medloop.testing import asgi_client, tiny_probabilities
from medloop.vision.encode import encode_png
from medloop.vision.golden import awkward_images
from medloop_inference.foreign import MAX_JSON

from .speaking import speaking

pytestmark = pytest.mark.anyio

DARK, BRIGHT = (base64.b64encode(encode_png(np.full((16, 16), level, np.uint8))).decode() for level in (0, 255))
PIXELS = [[[[level]] * 16] * 16 for level in (0, 255)]


@pytest.fixture
def app(first: Bundle) -> App:
    return speaking(first)


@pytest.fixture
async def serving(app: App) -> AsyncIterator[httpx.AsyncClient]:
    async with asgi_client(app) as client:
        yield client


async def test_ping_tells_whether_a_model_answers(serving: httpx.AsyncClient, app: App) -> None:
    async with asgi_client(speaking(None)) as client:
        assert (await client.get("/ping")).status_code == 503
    assert (await serving.get("/ping")).status_code == 200
    app.readiness.drain()
    assert (await serving.get("/ping")).status_code == 503


@pytest.mark.parametrize(
    ("content_type", "image"),
    [
        ("image/png", base64.b64decode(BRIGHT)),
        ("image/jpeg", awkward_images(64)[1]),
        ("application/x-image", base64.b64decode(BRIGHT)),
        ("Application/Octet-Stream; v=1", base64.b64decode(BRIGHT)),
    ],
)
async def test_an_image_gives_its_prediction(serving: httpx.AsyncClient, content_type: str, image: bytes) -> None:
    response = await serving.post("/invocations", content=image, headers={"content-type": content_type})
    assert response.status_code == 200
    assert Prediction.model_validate(response.json()).model.version == "1"


@pytest.mark.parametrize(
    "document",
    [
        {"inputs": [DARK, BRIGHT]},
        {"inputs": {"image": [DARK, BRIGHT]}},
        {"instances": [DARK, BRIGHT]},
        {"instances": [{"image": DARK}, {"image": BRIGHT}]},
        {"instances": [{"b64": DARK}, {"image": {"b64": BRIGHT}}]},
        {"dataframe_split": {"index": [0, 1], "columns": ["image"], "data": [[DARK], [BRIGHT]]}},
        {"dataframe_records": [{"image": DARK}, {"image": BRIGHT}]},
        {"inputs": PIXELS},
        {"inputs": {"image": PIXELS}},
        {"instances": [{"image": PIXELS[0]}, {"image": PIXELS[1]}]},
    ],
)
async def test_every_form_of_mlflows_json_gives_the_same_answers(serving: httpx.AsyncClient, document: Any) -> None:
    response = await serving.post(
        "/invocations", json=document, headers={"accept": "application/json, text/plain;q=0.1"}
    )
    assert response.status_code == 200, response.text
    predictions = [Prediction.model_validate(each) for each in response.json()["predictions"]]
    assert [prediction.label for prediction in predictions] == ["dark", "bright"]
    for prediction, level in zip(predictions, (0, 255), strict=True):
        truth = tiny_probabilities(np.full((16, 16, 1), level, np.uint8))
        assert list(prediction.probabilities.values()) == pytest.approx(truth, abs=1e-6)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b'{"inputs": [NaN]}', "no JSON"),
        (b"\xff", "no JSON"),
        (b"[]", "exactly one of"),
        (b"{}", "exactly one of"),
        ({"inputs": [DARK], "instances": [DARK]}, "exactly one of"),
        ({"inputs": [DARK], "params": {"cam": True}}, "exactly one of"),
        ({"inputs": []}, "at least one image"),
        ({"inputs": {"picture": [DARK]}}, "at least one image"),
        ({"inputs": 7}, "at least one image"),
        ({"inputs": ["no base64"]}, "Image 0 is not base64"),
        ({"inputs": [DARK, 7]}, "whole numbers"),
        ({"inputs": [[1], [1, 2]]}, "nested as ['N', 16, 16, 1]"),
        ({"inputs": [[[[True]] * 16] * 16]}, "from 0 to 255"),
        ({"inputs": [0] * 257}, "1 to 256 images"),
        ({"inputs": [DARK] * 257}, "1 to 256 images"),
        ({"instances": {"image": DARK}}, "at least one image"),
        ({"instances": [{"image": DARK, "age": 7}]}, "whole numbers"),
        ({"dataframe_records": [7]}, "['N', 16, 16, 1]"),
        ({"dataframe_split": {"columns": ["image"]}}, "must have data"),
        ({"dataframe_split": {"columns": ["a", "b"], "data": [[DARK, DARK]]}}, "columns ['image']"),
        ({"dataframe_split": {"columns": ["image"], "data": [[]]}}, "one value"),
        ({"inputs": [[[[256]] * 16] * 16]}, "from 0 to 255"),
        ({"inputs": [[[[0]] * 16] * 15]}, "['N', 16, 16, 1]"),
        ({"inputs": [DARK, base64.b64encode(b"poison").decode()]}, "Image 1, counted from 0: This is not an image"),
    ],
)
async def test_what_a_client_gets_wrong_is_told_as_400(serving: httpx.AsyncClient, body: Any, says: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = await serving.post("/invocations", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert says in response.json()["detail"]
    assert (response.json()["error_code"], response.json()["message"]) == ("BAD_REQUEST", response.json()["detail"])


async def test_other_types_in_and_out_are_refused(serving: httpx.AsyncClient) -> None:
    refused = await serving.post("/invocations", content=b"a,b", headers={"content-type": "text/csv"})
    assert (refused.status_code, refused.json()["code"]) == (415, "unsupported-image")
    refused = await serving.post("/invocations", json={"inputs": [DARK]}, headers={"accept": "text/csv"})
    assert refused.status_code == 406


async def test_json_beyond_the_limit_is_told_of_the_ways_without(serving: httpx.AsyncClient) -> None:
    body = b'{"inputs": [' + b" " * MAX_JSON + b"]}"
    refused = await serving.post("/invocations", content=body, headers={"content-type": "application/json"})
    assert (refused.status_code, refused.json()["code"]) == (413, "body-too-large")
    assert "/v1/predict/stream" in refused.json()["message"]
