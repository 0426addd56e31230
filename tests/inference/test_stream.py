"""A stream of images: answered while it arrives, bounded, and cut short without harm."""

import asyncio
import base64
import contextlib
import json
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from medloop.bundle import Bundle
from medloop.errors import BodyTooSlow, InvalidRequest, Overloaded
from medloop.http import App
from medloop.http.held import BODIES, Held, Share
from medloop.testing import asgi_client, live_server, tiny_probabilities
from medloop_inference import stream_bodies
from medloop_inference.answer import Answer, Options
from medloop_inference.stream import IN_WORK, UNREAD, _Window
from medloop_inference.stream_bodies import ENTRY_SECONDS, Entry, read_lines, read_parts

from .speaking import Service, speaking

pytestmark = pytest.mark.anyio

Grey = Callable[..., bytes]
URL = "/v1/predict/stream"
NDJSON = {"content-type": "application/x-ndjson"}


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


@pytest.fixture
def address(app: App) -> Iterator[str]:
    with live_server(app) as url:
        yield url


def line(image: bytes, name: Any = None) -> bytes:
    return json.dumps({"id": name, "image": base64.b64encode(image).decode()}).encode() + b"\n"


def read(response: httpx.Response) -> tuple[dict[int, dict[str, Any]], dict[str, Any]]:
    """The answers by their index, and the summary."""
    assert response.status_code == 200, response.text
    *lines, last = (json.loads(text) for text in response.text.splitlines())
    return {each["index"]: each for each in lines}, last["summary"]


async def test_each_line_is_answered_or_refused_on_its_own(serving: httpx.AsyncClient, grey: Grey) -> None:
    body = [
        line(grey(0), "a"),
        line(b"poison", 7),
        b"\n",
        b"no json\n",
        b'{"image": "no base64", "id": "b"}\n',
        b'{"image": "", "size": 1}\n',
        line(grey(255)).rstrip(),
    ]
    answers, summary = read(await serving.post(URL, content=b"".join(body), headers=NDJSON))
    assert summary == {"images": 6, "answered": 2, "refused": 4}
    assert {index: each["id"] for index, each in answers.items()} == {0: "a", 1: 7, 2: None, 3: "b", 4: None, 5: None}
    assert [answers[i]["prediction"]["label"] for i in (0, 5)] == ["dark", "bright"]
    assert [answers[i]["problem"]["status"] for i in (1, 2, 3, 4)] == [415, 400, 400, 400]


async def test_a_form_is_a_stream_too(serving: httpx.AsyncClient, grey: Grey) -> None:
    files = [
        ("image", (name, image, "image/png")) for name, image in [("a.png", grey(0)), ("ä.png", b""), ("c", grey(255))]
    ]
    answers, summary = read(await serving.post(URL, files=files))
    assert summary == {"images": 3, "answered": 2, "refused": 1}
    assert [answers[i]["id"] for i in range(3)] == ["a.png", "ä.png", "c"]
    assert answers[2]["prediction"]["label"] == "bright"


@pytest.mark.parametrize(
    ("headers", "status", "says"),
    [
        ({"content-type": "image/png"}, 415, "application/x-ndjson"),
        ({}, 415, "application/x-ndjson"),
        ({"content-type": "multipart/form-data"}, 400, "boundary"),
        ({**NDJSON, "x-request-timeout-ms": "0"}, 400, "X-Request-Timeout-Ms"),
    ],
)
async def test_what_is_no_stream_is_refused_at_once(
    serving: httpx.AsyncClient, headers: dict[str, str], status: int, says: str
) -> None:
    response = await serving.post(URL, content=b"x", headers=headers)
    assert response.status_code == status
    assert says in response.json()["detail"]


@pytest.mark.parametrize("body", [b"", b"--x\r\n\r\n", b"--y\r\n\r\nab\r\n--y--\r\n", b'--x\r\nname="a'])
async def test_a_broken_form_ends_with_why(serving: httpx.AsyncClient, body: bytes) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    _, summary = read(await serving.post(URL, content=body, headers=headers))
    assert summary["problem"]["status"] == 400


async def test_without_a_champion_it_says_so_first() -> None:
    async with asgi_client(speaking(None)) as client:
        assert (await client.post(URL, content=b"", headers=NDJSON)).status_code == 503


def test_answers_come_while_the_body_is_still_sent(address: str, grey: Grey) -> None:
    async def converse() -> list[str]:
        host, _, port = address.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST %s HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/x-ndjson\r\n" % URL.encode())
        writer.write(b"transfer-encoding: chunked\r\n\r\n")
        labels = []
        for level in (0, 255, 0):
            text = line(grey(level))
            writer.write(b"%x\r\n%s\r\n" % (len(text), text))
            while b'"label"' not in (answer := await asyncio.wait_for(reader.readline(), 10)):
                pass
            labels.append(json.loads(answer)["prediction"]["label"])
        writer.write(b"0\r\n\r\n")
        rest = await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 10)
        assert b'"answered":3' in rest
        writer.close()
        await writer.wait_closed()
        return labels

    assert asyncio.run(converse()) == ["dark", "bright", "dark"]


class Slow:
    """Stands before a predictor: counts who waits, and lets nobody through until it is told."""

    def __init__(self, predictor: Any, refusals: int = 0) -> None:
        self.predictor, self.refusals = predictor, refusals
        self.open = asyncio.Event()
        self.waiting = self.most = self.asked = self.cancelled = 0

    async def predict(self, image: bytes, options: Options) -> Answer:
        self.asked += 1
        if self.refusals:
            self.refusals -= 1
            raise Overloaded("Busy.")
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        try:
            await self.open.wait()
            answer: Answer = await self.predictor.predict(image, options)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.waiting -= 1
        return answer


async def test_it_reads_no_further_than_it_can_answer(
    serving: httpx.AsyncClient, service: Service, grey: Grey, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(service.predictor)
    monkeypatch.setattr(service, "predictor", slow)
    sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(4 * IN_WORK):
            yield line(grey(0))
            sent += 1

    asking = asyncio.create_task(serving.post(URL, content=body(), headers=NDJSON))
    while slow.waiting < IN_WORK:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    assert slow.most == IN_WORK
    assert sent <= IN_WORK + 1
    slow.open.set()
    _, summary = read(await asking)
    assert summary["answered"] == 4 * IN_WORK


async def test_a_busy_service_is_waited_for(
    serving: httpx.AsyncClient, service: Service, grey: Grey, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(service.predictor, refusals=20)
    slow.open.set()
    monkeypatch.setattr(service, "predictor", slow)
    _, summary = read(await serving.post(URL, content=line(grey(0)) * 16, headers=NDJSON))
    assert summary == {"images": 16, "answered": 16, "refused": 0}
    assert slow.asked >= 36


async def test_the_window_shrinks_when_busy_and_always_lets_one_in() -> None:
    window = _Window()
    for _ in range(10):
        window.busy()
    await window.enter(10**12)
    entering = asyncio.create_task(window.enter(1))
    await asyncio.sleep(0)
    assert not entering.done()
    window.leave(10**12)
    await asyncio.wait_for(entering, 30)


def test_a_client_that_leaves_takes_its_work_along(address: str, app: App, service: Service, grey: Grey) -> None:
    async def until(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.01)

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=address) as client:
            asking = asyncio.create_task(client.post(URL, content=line(grey(0)) * 8, headers=NDJSON, timeout=60))
            await until(lambda: slow.waiting == 8)
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asking
        await until(lambda: slow.cancelled == 8)

    slow = Slow(service.predictor)
    service.predictor = slow  # lets nobody through
    asyncio.run(leave())
    assert (slow.asked, slow.cancelled) == (8, 8)
    assert app.guard.held_bytes == 0


def test_a_client_that_sends_everything_first_is_answered(address: str, grey: Grey) -> None:
    """httpx reads no answer before it has sent the whole body."""
    levels = np.random.default_rng(0).integers(0, 256, UNREAD).tolist()
    images = {level: grey(level) for level in range(256)}
    body = b"".join(line(images[level], level) for level in levels)
    answers, summary = read(httpx.post(address + URL, content=body, headers=NDJSON, timeout=30))
    assert summary["answered"] == UNREAD
    for index, level in enumerate(levels):
        truth = tiny_probabilities(np.full((16, 16, 1), level, np.uint8))
        assert answers[index]["id"] == level
        assert list(answers[index]["prediction"]["probabilities"].values()) == pytest.approx(truth, abs=1e-6)


def alone() -> Share:
    """Of a request beside which there is no other."""
    return Share(Held(1))


async def chunks(data: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_the_pieces_a_body_comes_in_make_no_difference(size: int) -> None:
    lines = line(b"one", "a") + b"\r\n" + line(b"two") + b"x"
    found = [entry async for entry in read_lines(chunks(lines, size), alone())]
    assert found[:2] == [Entry(0, "a", b"one"), Entry(1, None, b"two")]
    assert isinstance(found[2].image, InvalidRequest)
    part = b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
    form = part % (b"a", b"one\r\n--") + part % (b"b", b"") + b"--x--\r\n"
    entries = [entry async for entry in read_parts(chunks(form, size), b"x", alone())]
    assert entries == [Entry(0, "a", b"one\r\n--"), Entry(1, "b", b"")]


async def test_an_image_beyond_the_limit_is_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_bodies, "MAX_IMAGE", 100)
    monkeypatch.setattr(stream_bodies, "MAX_LINE", 200)
    body = line(bytes(500), "large") + line(b"one", "a")
    found = [entry async for entry in read_lines(chunks(body, 64), alone())]
    assert [getattr(entry.image, "code", entry.image) for entry in found] == ["image-too-large", b"one"]
    form = b"--x\r\n\r\n" + bytes(500) + b"\r\n--x\r\n\r\none\r\n--x--\r\n"
    entries = [entry async for entry in read_parts(chunks(form, 64), b"x", alone())]
    assert [getattr(entry.image, "code", entry.image) for entry in entries] == ["image-too-large", b"one"]


@pytest.mark.parametrize(
    "odd",
    [
        b'{"id": [' + b"[]," * 2**20 + b'1], "image": ""}',
        b'{"id": 1, "image": "", "frame": 2147483648}',
        b'{"id": 1, "image": "", "frame": 0}',
    ],
    ids=["objects", "large", "zero"],
)
async def test_a_line_that_is_no_image_costs_little_and_ends_nothing(odd: bytes) -> None:
    tracemalloc.start()
    try:
        found = [entry async for entry in read_lines(chunks(odd + b"\n" + line(b"one", "a"), 2**16), alone())]
        assert tracemalloc.get_traced_memory()[1] < 4 * len(odd) + 2**20
    finally:
        tracemalloc.stop()
    assert [getattr(entry.image, "code", entry.image) for entry in found] == ["invalid-request", b"one"]


@pytest.mark.parametrize("form", [False, True], ids=["lines", "form"])
async def test_an_image_that_is_too_much_for_all_together_is_let_go_alone(form: bool) -> None:
    held = Held(100)
    share, other = Share(held), Share(held)
    image, limit = bytes(300), BODIES * 100
    texts = [PART + image + b"\r\n", PART + b"one\r\n--x--"] if form else [line(image), line(b"one")]
    pieces = chunks(b"".join(texts), 64)
    found: list[Any] = []
    other.add(limit - 200)
    async for entry in read_parts(pieces, b"x", share) if form else read_lines(pieces, share):
        found.append(getattr(entry.image, "code", entry.image))
        assert share.bytes <= 64
    assert found == ["overloaded", b"one"]
    assert (share.bytes, held.bytes) == (0, limit - 200)
    assert other.add(10**9) is None, "who is alone is never refused"


async def test_what_streams_hold_counts_with_all_bodies(first: Bundle, grey: Grey) -> None:
    app = speaking(first, max_body_bytes=1000)
    grow, end = asyncio.Event(), asyncio.Event()

    async def unfinished() -> AsyncIterator[bytes]:
        yield b'{"image": "' + b"A" * 500
        await grow.wait()
        yield b"A" * 600 + b'"}\n' + line(grey(0))

    async def filling() -> AsyncIterator[bytes]:
        yield bytes(1000)
        await end.wait()

    async with asgi_client(app) as client:
        large = asyncio.create_task(client.post(URL, content=unfinished(), headers=NDJSON))
        bodies = [asyncio.create_task(client.post("/v2/models/tiny/infer", content=filling())) for _ in range(7)]
        while app.guard.held_bytes < 7 * 1000 + 500:
            await asyncio.sleep(0.01)
        small = asyncio.create_task(client.post(URL, content=line(grey(255)), headers=NDJSON))
        await asyncio.sleep(0.05)
        assert not small.done(), "there is no room to begin another"
        grow.set()
        answers, summary = read(await large)
        assert answers[0]["problem"]["code"] == "overloaded"
        assert (summary["answered"], summary["refused"]) == (1, 1)
        assert read(await small)[1]["answered"] == 1
        end.set()
        await asyncio.gather(*bodies)
    assert app.guard.held_bytes == 0


class Clock:
    """The event loop's clock, put forward instead of waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loop, self._ahead = asyncio.get_running_loop(), 0.0
        real = loop.time
        monkeypatch.setattr(loop, "time", lambda: real() + self._ahead)

    async def pass_by(self, seconds: float) -> None:
        self._ahead += seconds
        await asyncio.sleep(0.001)  # in which the loop notices what is due


PART = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n'


@pytest.mark.parametrize(
    ("trickle", "whole"),
    [
        ([b'{"image": "', *[b"A"] * 20], [line(b"one"), b"\n", b"\n", line(b"two"), b"\n", b"\n"]),
        ([PART, *[b"A"] * 20], [PART + b"one\r\n", PART + b"two\r\n--x", b"--\r\n", b"\r\n", b"\r\n"]),
        ([b"--x\r\n", *[b"A"] * 20], [b"\r\n", b"\r\n", b"\r\n", b"\r\n", PART + b"one\r\n--x--"]),
    ],
    ids=["line", "part", "header"],
)
async def test_only_an_image_that_has_begun_must_come_to_its_end(
    trickle: list[bytes], whole: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)

    async def slowly(*pieces: bytes) -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece
            await clock.pass_by(ENTRY_SECONDS / 3)

    def entries(pieces: list[bytes]) -> AsyncIterator[Entry]:
        return (
            read_lines(slowly(*pieces), alone())
            if b"image" in pieces[0]
            else read_parts(slowly(*pieces), b"x", alone())
        )

    assert all([isinstance(entry.image, bytes) async for entry in entries(whole)])
    with pytest.raises(BodyTooSlow, match="send it faster"):
        assert not [entry async for entry in entries(trickle)]


async def test_the_time_of_a_busy_service_is_not_the_senders(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    async for entry in read_lines(chunks(line(b"one") * 4, 50), alone()):
        assert entry.image == b"one"
        await clock.pass_by(2 * ENTRY_SECONDS)
