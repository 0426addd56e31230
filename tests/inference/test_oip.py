"""The Open Inference Protocol as a client meets it: NVIDIA's own, and one that gets everything wrong."""

import base64
import gzip
import hashlib
import json
import struct
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from medloop.bundle import Bundle
from medloop.errors import InvalidRequest
from medloop.http import App
from medloop.testing import asgi_client, live_server, tiny_probabilities
from medloop.vision.encode import encode_png
from medloop.vision.prepare import PreparationSpec
from medloop_inference import oip
from medloop_inference.answer import Answer
from medloop_inference.foreign import MAX_JSON, MAX_LISTS
from medloop_inference.tensors import MAX_INFLATED, OUTPUTS, inflate, read_elements, read_request, write_elements

from .speaking import Service, load_version, speaking

pytestmark = pytest.mark.anyio

Grey = Callable[..., bytes]
URL = "/v2/models/tiny/infer"
SPEC = PreparationSpec(mode="L", size=16)


@pytest.fixture
def app(first: Bundle) -> App:
    return speaking(first)


@pytest.fixture
def service(app: App) -> Service:
    found: Service = app.state.service
    return found


@pytest.fixture
async def serving(app: App) -> AsyncIterator[httpx.AsyncClient]:
    async with asgi_client(app) as client:
        yield client


def image_input(*images: bytes) -> dict[str, Any]:
    data = [base64.b64encode(image).decode() for image in images]
    return {"name": "image", "shape": [len(images)], "datatype": "BYTES", "data": data}


def outputs_of(response: httpx.Response) -> dict[str, dict[str, Any]]:
    assert response.status_code == 200, response.text
    return {output["name"]: output for output in response.json()["outputs"]}


async def test_server_and_model_describe_themselves(serving: httpx.AsyncClient) -> None:
    assert "binary_tensor_data" in (await serving.get("/v2")).json()["extensions"]
    assert (await serving.get("/v2/health/live")).json() == {"live": True}
    assert (await serving.get("/v2/health/ready")).json() == {"ready": True}
    assert (await serving.get("/v2/models/tiny/versions/1/ready")).json() == {"name": "tiny", "ready": True}
    described = (await serving.get("/v2/models/tiny")).json()
    assert (described["name"], described["versions"]) == ("tiny", ["1"])
    assert described["platform"] == "onnxruntime_float32"
    assert described["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    shapes = {output["name"]: output["shape"] for output in described["outputs"]}
    assert shapes["probabilities"] == [-1, 2]
    assert set(shapes) == set(OUTPUTS)


async def test_without_a_champion_it_lives_and_is_not_ready() -> None:
    async with asgi_client(speaking(None)) as client:
        assert (await client.get("/v2/health/live")).status_code == 200
        for path in ("/v2/health/ready", "/v2/models/tiny/ready", "/v2/models/tiny"):
            response = await client.get(path)
            assert response.status_code == 503
            assert "no approved champion" in response.json()["error"]


@pytest.mark.parametrize(
    "path", ["/v2/models/other", "/v2/models/tiny/versions/2", "/v2/models/tiny/versions/previous"]
)
async def test_only_the_served_model_and_version_are_found(serving: httpx.AsyncClient, path: str, grey: Grey) -> None:
    body = {"inputs": [image_input(grey(0))]}
    for response in (
        await serving.get(path),
        await serving.get(f"{path}/ready"),
        await serving.post(f"{path}/infer", json=body),
    ):
        assert response.status_code == 404
        assert response.json()["error"].endswith("what answers is tiny version 1.")
        assert response.json()["code"] == "not-found"


async def test_json_in_and_out_has_every_output_in_the_order_of_the_images(
    serving: httpx.AsyncClient, service: Service, grey: Grey
) -> None:
    images = [grey(0), grey(255), grey(128)]
    response = await serving.post(URL, json={"id": "mine", "inputs": [image_input(*images)]})
    document, outputs = response.json(), outputs_of(response)
    assert (document["model_name"], document["model_version"], document["id"]) == ("tiny", "1", "mine")
    assert "inference-header-content-length" not in response.headers
    assert outputs["label"]["data"] == ["dark", "bright", "bright"]
    truth = [tiny_probabilities(np.full((16, 16, 1), level, np.uint8)) for level in (0, 255, 128)]
    assert outputs["probabilities"]["shape"] == [3, 2]
    assert outputs["probabilities"]["data"] == pytest.approx(np.ravel(truth), abs=1e-6)
    assert [json.loads(text) for text in outputs["prediction_set"]["data"]] == [
        ["dark"],
        ["bright"],
        ["bright", "dark"],
    ]
    assert outputs["decision"]["data"] == ["accept", "accept", "refer"]
    assert [json.loads(text) for text in outputs["reasons"]["data"]] == [[], [], ["ambiguous"]]
    told = {answer.document["id"]: answer.document for _, answer in service.ear.told if isinstance(answer, Answer)}
    found = [told[each]["image_hash"] for each in outputs["prediction_id"]["data"]]
    assert found == [hashlib.sha256(image).hexdigest() for image in images]


async def test_prepared_pixels_give_the_answers_of_their_images(serving: httpx.AsyncClient, grey: Grey) -> None:
    pixels = np.stack([np.full((16, 16, 1), level, np.uint8) for level in (10, 140)])
    tensor = {"name": "image", "shape": [2, 16, 16, 1], "datatype": "UINT8"}
    wanted = [{"name": "probabilities"}]
    expected = outputs_of(await serving.post(URL, json={"inputs": [image_input(grey(10), grey(140))]}))
    head = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": 512}}], "outputs": wanted}).encode()
    answers = [
        await serving.post(URL, json={"inputs": [{**tensor, "data": data}], "outputs": wanted})
        for data in (pixels.tolist(), pixels.ravel().tolist())
    ]
    answers.append(
        await serving.post(
            URL, content=head + pixels.tobytes(), headers={"Inference-Header-Content-Length": str(len(head))}
        )
    )
    for answer in answers:
        assert list(outputs_of(answer)) == ["probabilities"]
        assert outputs_of(answer)["probabilities"]["data"] == expected["probabilities"]["data"]


@pytest.fixture
def address(app: App) -> Iterator[str]:
    """A real server that answers with `first`."""
    with live_server(app) as url:
        yield url


def test_nvidias_client_works_unchanged(address: str, grey: Grey) -> None:
    import tritonclient.http as triton
    from tritonclient.utils import InferenceServerException

    client = triton.InferenceServerClient(address.removeprefix("http://"), concurrency=2)
    try:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("tiny")
        assert not client.is_model_ready("tiny", "7")
        assert client.get_server_metadata()["name"] == "medloop"
        assert client.get_model_metadata("tiny", "1")["inputs"][0]["datatype"] == "BYTES"

        levels = (0, 128, 255)
        files = triton.InferInput("image", [3], "BYTES")
        files.set_data_from_numpy(np.array([grey(level) for level in levels], object))
        pixels = triton.InferInput("image", [3, 16, 16, 1], "UINT8")
        prepared = np.stack([np.full((16, 16, 1), level, np.uint8) for level in levels])
        truth = np.stack([tiny_probabilities(image) for image in prepared])
        for binary in (True, False):
            pixels.set_data_from_numpy(prepared, binary_data=binary)
            for asked in (files, pixels):
                result = client.infer("tiny", [asked], request_id="mine")
                assert result.get_response()["id"] == "mine"
                assert result.as_numpy("probabilities") == pytest.approx(truth, abs=1e-6)
                assert [label.decode() for label in result.as_numpy("label")] == ["dark", "bright", "bright"]
        mixed = [
            triton.InferRequestedOutput("probabilities", binary_data=True),
            triton.InferRequestedOutput("decision", binary_data=False),
        ]
        result = client.infer("tiny", [files], "1", outputs=mixed, request_compression_algorithm="gzip", timeout=10**7)
        assert result.as_numpy("probabilities").dtype == np.float32
        assert list(result.as_numpy("decision")) == ["accept", "refer", "accept"]
        assert result.get_output("label") is None
        waiting = [client.async_infer("tiny", [files]) for _ in range(8)]
        assert all(each.get_result().as_numpy("label").shape == (3,) for each in waiting)

        files.set_data_from_numpy(np.array([grey(0), b"no image", grey(0)], object))
        with pytest.raises(InferenceServerException, match="Image 1, counted from 0: This is not an image") as caught:
            client.infer("tiny", [files])
        assert caught.value.status() == "400"
        with pytest.raises(InferenceServerException, match="what answers is tiny version 1"):
            client.infer("tiny", [pixels], "2")
    finally:
        client.close()


PIXELS = {"name": "image", "shape": [1, 16, 16, 1], "datatype": "UINT8"}
FILE = {"name": "image", "shape": [1], "datatype": "BYTES", "data": ["QUJD"]}
ZERO = struct.pack("<I", 0)


def behind(size: Any, **changes: Any) -> dict[str, Any]:
    return {"inputs": [{**PIXELS, "parameters": {"binary_data_size": size}, **changes}]}


@pytest.mark.parametrize(
    ("document", "extra", "says"),
    [
        ({}, b"", "inputs: Field required"),
        ({"inputs": []}, b"", "at least 1 item"),
        ({"inputs": [FILE, FILE]}, b"", "at most 1 item"),
        ({"inputs": [{**FILE, "name": "picture"}]}, b"", "no input 'picture'"),
        ({"inputs": [{**FILE, "shape": [2]}]}, b"", "data has 1 elements"),
        ({"inputs": [{**FILE, "shape": [0], "data": []}]}, b"", "1 to 256"),
        ({"inputs": [{**FILE, "shape": [-1]}]}, b"", "1 to 256"),
        ({"inputs": [{**FILE, "shape": [10**12]}]}, b"", "1 to 256"),
        ({"inputs": [{**FILE, "shape": [10**40]}]}, b"", "inputs.0.shape.0"),
        ({"inputs": [{**FILE, "shape": []}]}, b"", "1 to 256"),
        ({"inputs": [{**FILE, "shape": [True]}]}, b"", "valid integer"),
        ({"inputs": [{**FILE, "shape": ["1"]}]}, b"", "valid integer"),
        ({"inputs": [{**FILE, "shape": [1, 1]}]}, b"", "not an input of this model"),
        ({"inputs": [{**FILE, "datatype": "FP32"}]}, b"", "not an input of this model"),
        ({"inputs": [{**FILE, "data": ["not base64!"]}]}, b"", "not base64"),
        ({"inputs": [{**FILE, "data": ["ä"]}]}, b"", "not base64"),
        ({"inputs": [{**FILE, "data": [7]}]}, b"", "must be text"),
        ({"inputs": [{**FILE, "data": None}]}, b"", "either data or a binary_data_size"),
        ({"inputs": [{**FILE, "parameters": {"shared_memory_region": "x"}}]}, b"", "shared_memory_region"),
        ({"inputs": [FILE], "outputs": [{"name": "logits"}]}, b"", "no output 'logits'"),
        ({"inputs": [FILE], "outputs": [{"name": "label"}] * 2}, b"", "requested twice"),
        (
            {"inputs": [FILE], "outputs": [{"name": "label", "parameters": {"classification": 3}}]},
            b"",
            "classification",
        ),
        ({"inputs": [FILE]}, b"", "Image 0, counted from 0"),
        ({"inputs": [FILE], "parameters": {"timeout": -1}}, b"", "parameters.timeout"),
        ({"inputs": [FILE], "parameters": {"frame": 2**31}}, b"", "parameters.frame"),
        ({"inputs": [FILE]}, b"xyz", "3 bytes follow"),
        ({"inputs": [{**PIXELS, "data": [0] * 255}]}, b"", "nested as ['N', 16, 16, 1]"),
        ({"inputs": [{**PIXELS, "data": [300] * 256}]}, b"", "from 0 to 255"),
        ({"inputs": [{**PIXELS, "data": [-1] * 256}]}, b"", "from 0 to 255"),
        ({"inputs": [{**PIXELS, "data": [0.5] * 256}]}, b"", "from 0 to 255"),
        ({"inputs": [{**PIXELS, "data": [10**30] * 256}]}, b"", "from 0 to 255"),
        ({"inputs": [{**PIXELS, "data": [[1], [2, 3]]}]}, b"", "nested as ['N', 16, 16, 1]"),
        ({"inputs": [{**PIXELS, "data": [True] * 256}]}, b"", "from 0 to 255"),
        ({"inputs": [{**PIXELS, "data": ["a"] * 256}]}, b"", "from 0 to 255"),
        ({"inputs": [{**PIXELS, "data": []}]}, b"", "from 0 to 255"),
        ({"inputs": [{**PIXELS, "shape": [1, 8, 8, 1], "data": [0] * 64}]}, b"", "not an input of this model"),
        (behind(256), bytes(255), "255 bytes follow"),
        (behind(255), bytes(255), "takes 256 bytes"),
        (behind(-1), b"", "binary_data_size"),
        (behind(10**30), b"", "binary_data_size"),
        (behind(True), b"x", "binary_data_size"),
        (behind("256"), bytes(256), "binary_data_size"),
        (behind(256, data=[0]), bytes(256), "not both"),
        (behind(2, shape=[1], datatype="BYTES"), b"\1\0", "cut off"),
        (behind(4, shape=[1], datatype="BYTES"), b"\xff\xff\xff\xff", "longer than what was sent"),
        (behind(8, shape=[1], datatype="BYTES"), ZERO + ZERO, "does not hold the 1 elements"),
        (behind(4, shape=[2], datatype="BYTES"), ZERO, "does not hold the 2 elements"),
    ],
)
async def test_what_a_client_gets_wrong_is_told_as_400(
    serving: httpx.AsyncClient, document: Any, extra: bytes, says: str
) -> None:
    head = json.dumps(document).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    response = await serving.post(URL, content=head + extra, headers=headers)
    assert response.status_code == 400, response.text
    assert says in response.json()["error"]
    assert response.json()["detail"] == response.json()["error"]


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"", {}, 400),
        (b"{", {}, 400),
        (b"[" * 100_000, {}, 400),
        (b"\xff\xfe", {}, 400),
        (b"{}", {"Inference-Header-Content-Length": "3"}, 400),
        (b"{}", {"Inference-Header-Content-Length": "-1"}, 400),
        (b"{}", {"Inference-Header-Content-Length": "1e1"}, 400),
        (b"{}", {"Inference-Header-Content-Length": "9" * 400}, 400),
        (b"{}", {"Content-Encoding": "br"}, 400),
        (b"{}", {"Content-Encoding": "gzip"}, 400),
        (gzip.compress(b"{}")[:-4], {"Content-Encoding": "gzip"}, 400),
        (zlib.compress(bytes(MAX_INFLATED + 1), 9), {"Content-Encoding": "deflate"}, 413),
        (zlib.compress(bytes(MAX_JSON + 1), 9), {"Content-Encoding": "deflate"}, 413),
        (b" " * MAX_JSON + b"{}", {"Inference-Header-Content-Length": str(MAX_JSON + 2)}, 413),
        (b'{"inputs":[' + b"[]," * MAX_LISTS + b"[]]}", {}, 413),
        (b"{}", {"X-Request-Timeout-Ms": "soon"}, 400),
    ],
    ids=range(16),
)
async def test_bodies_that_are_no_requests(
    serving: httpx.AsyncClient, body: bytes, headers: dict[str, str], status: int
) -> None:
    started = time.monotonic()
    response = await serving.post(URL, content=body, headers=headers)
    assert response.status_code == status
    assert response.json()["error"]
    assert time.monotonic() - started < 10  # a tenth of a second at most, alone


async def test_nothing_is_unpacked_for_who_would_be_refused_anyway(
    serving: httpx.AsyncClient, service: Service
) -> None:
    service.predictor.admission.images = 10**6
    refused = await serving.post(URL, content=b"not packed", headers={"Content-Encoding": "gzip"})
    assert refused.status_code == 429


async def test_even_the_smallest_packed_body_is_unpacked_beside_the_event_loop(
    serving: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def watched(*args: Any) -> bytes:
        threads.append(threading.get_ident())
        return inflate(*args)

    monkeypatch.setattr(oip, "inflate", watched)
    await serving.post(URL, content=b"")
    await serving.post(URL, content=gzip.compress(b""), headers={"Content-Encoding": "gzip"})
    assert [thread == threading.get_ident() for thread in threads] == [True, False]


async def test_no_other_version_answers_for_the_one_that_was_asked(
    serving: httpx.AsyncClient, service: Service, second: Bundle, grey: Grey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model changes after the request was understood, and before its images are on their way."""
    before, after = service.watcher.served(), load_version(second, "2")
    for way in ("predict_many", "predict_pixels"):
        ask = getattr(service.predictor, way)

        async def changed(images: Any, options: Any, ask: Any = ask) -> Any:
            service.watcher.change(after)
            return await ask(images, options)

        monkeypatch.setattr(service.predictor, way, changed)
    files, pixels = image_input(grey(0)), {**PIXELS, "data": [0] * 256}
    cases: list[tuple[str, dict[str, Any], int]] = [
        ("/v2/models/tiny/versions/1/infer", {"inputs": [files]}, 503),
        (URL, {"inputs": [pixels]}, 503),
        ("/invocations", {"inputs": [[[[0]] * 16] * 16]}, 503),
        (URL, {"inputs": [files]}, 200),
    ]
    for path, document, status in cases:
        service.watcher.change(before)
        response = await serving.post(path, json=document)
        assert response.status_code == status, response.text
    assert response.json()["model_version"] == "2"


def test_elements_survive_the_way_there_and_back() -> None:
    texts = ["", "dark", "größer", "x" * 70_000]
    encoded = write_elements(texts)
    assert read_elements(memoryview(encoded), 4) == [text.encode() for text in texts]


@given(head=st.binary(max_size=200), length=st.text(max_size=5) | st.none(), encoding=st.sampled_from([None, "gzip"]))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_body_does_more_than_be_refused(head: bytes, length: str | None, encoding: str | None) -> None:
    with pytest.raises(InvalidRequest):
        read_request(inflate(head, encoding), length, SPEC)


async def test_sixteen_bit_files_count_as_files(serving: httpx.AsyncClient) -> None:
    image = encode_png(np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16))
    assert outputs_of(await serving.post(URL, json={"inputs": [image_input(image)]}))["label"]["shape"] == [1]
