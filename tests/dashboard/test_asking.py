"""Asking about many images in few requests."""

import json

import httpx
from medloop.clients import InferenceClient
from medloop.errors import InvalidImage, NoModel, Unavailable
from medloop.schemas import ModelRef, Prediction
from medloop_dashboard.asking import MAX_BATCH_BYTES, MAX_BATCH_IMAGES, Upload, ask

REF = ModelRef(name="m", version="1", run_id="r", dataset_id="d", bundle_digest="b")


def client(answer: httpx.MockTransport) -> InferenceClient:
    return InferenceClient("http://127.0.0.1", transport=answer)


class Echo:
    """Answers each file with its own content as label; content `bad` is refused."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        boundary = request.headers["content-type"].partition("boundary=")[2].encode()
        bodies = [
            part.partition(b"\r\n\r\n")[2].rstrip(b"\r\n") for part in request.read().split(b"--" + boundary)[1:-1]
        ]
        self.batches.append(len(bodies))
        items = []
        for index, body in enumerate(bodies):
            if body == b"bad":
                problem = {"type": "t", "title": "t", "status": 422, "detail": "No image.", "code": "invalid-image"}
                items.append({"index": index, "problem": problem})
            else:
                said = Prediction(
                    model=REF,
                    image_hash="h",
                    label=body[:20].decode(),
                    probabilities={},
                    prediction_set=[],
                    coverage=0.95,
                    milliseconds={},
                )
                items.append({"index": index, "prediction": json.loads(said.model_dump_json())})
        return httpx.Response(200, json={"items": items})


def uploads(*bodies: bytes) -> list[Upload]:
    return [Upload.of("name", body) for body in bodies]


def test_every_image_gets_its_own_answer_or_reason() -> None:
    asked = uploads(b"one", b"bad", b"two")
    answers = ask(client(httpx.MockTransport(Echo())), asked)
    one, bad, two = (answers[upload.digest] for upload in asked)
    assert isinstance(one, Prediction)
    assert isinstance(two, Prediction)
    assert (one.label, two.label) == ("one", "two")
    assert isinstance(bad, InvalidImage)
    assert bad.detail == "No image."


def test_requests_are_bounded_in_images_and_bytes() -> None:
    echo = Echo()
    many = uploads(*(str(i).encode() for i in range(2 * MAX_BATCH_IMAGES + 1)))
    answers = ask(client(httpx.MockTransport(echo)), many)
    assert echo.batches == [MAX_BATCH_IMAGES, MAX_BATCH_IMAGES, 1]
    assert [getattr(answers[u.digest], "label", None) for u in many] == [str(i) for i in range(len(many))]
    echo.batches.clear()
    ask(client(httpx.MockTransport(echo)), uploads(b"a" * (MAX_BATCH_BYTES - 1), b"b" * 2, b"c"))
    assert echo.batches == [1, 2]


def test_equal_files_are_sent_once() -> None:
    echo = Echo()
    assert len(ask(client(httpx.MockTransport(echo)), uploads(b"one", b"one"))) == 1
    assert echo.batches == [1]


def test_nothing_asks_nothing() -> None:
    echo = Echo()
    assert ask(client(httpx.MockTransport(echo)), []) == {}
    assert echo.batches == []


def test_a_service_that_fails_is_the_reason_for_all() -> None:
    def no_model(request: httpx.Request) -> httpx.Response:
        return httpx.Response(503, json={"code": "no-model", "detail": "Nothing is approved.", "status": 503})

    def down(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    asked = uploads(b"one", b"two")
    assert {type(a) for a in ask(client(httpx.MockTransport(no_model)), asked).values()} == {NoModel}
    assert {type(a) for a in ask(client(httpx.MockTransport(down)), asked).values()} == {Unavailable}
