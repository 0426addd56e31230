import asyncio
import logging
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import APIRouter, Request
from medloop.auth import AuthSettings, check_exposure
from medloop.errors import Forbidden, InvalidDataset, Issue, NotFound, Overloaded, StorageFull, Unavailable
from medloop.http import App, Direct, Readiness, create_app
from medloop.http.problems import Teller
from medloop.settings import ServerSettings
from medloop.testing import asgi_client
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

pytestmark = pytest.mark.anyio


class Body(BaseModel):
    number: int


def make_app(readiness: Readiness | None = None, **settings: int) -> App:
    router = APIRouter()

    @router.get("/full")
    async def full() -> None:
        raise StorageFull("The disk is full: free some space.", free=0)

    @router.get("/broken")
    async def broken() -> None:
        raise ZeroDivisionError("a secret of the implementation")

    @router.get("/dataset")
    async def dataset() -> None:
        raise InvalidDataset("Two things are wrong.", [Issue("unreadable", "a/b.png", "truncated")])

    @router.post("/number")
    async def number(body: Body) -> int:
        return body.number

    @router.post("/streamed")
    @router.post("/length")
    async def length(request: Request) -> int:
        return len(await request.body())

    return create_app(
        "test",
        ServerSettings.model_validate(settings),
        routers=[router],
        readiness=readiness or Readiness(),
        streamed={"/streamed"},
    )


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with asgi_client(make_app(max_body_bytes=1000)) as client:
        yield client


async def test_our_errors_become_problem_documents(client: httpx.AsyncClient) -> None:
    response = await client.get("/full", headers={"x-request-id": "abc-1"})
    assert response.status_code == 507
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json() == {
        "type": "urn:medloop:problem:storage-full",
        "title": "Insufficient Storage",
        "status": 507,
        "detail": "The disk is full: free some space.",
        "code": "storage-full",
        "instance": "/full",
        "request_id": "abc-1",
        "free": 0,
    }
    assert response.headers["x-request-id"] == "abc-1"


async def test_extra_members_survive(client: httpx.AsyncClient) -> None:
    document = (await client.get("/dataset")).json()
    assert document["issues"] == [{"kind": "unreadable", "where": "a/b.png", "detail": "truncated"}]


async def test_an_unexpected_error_tells_the_log_and_not_the_caller(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        response = await client.get("/broken")
    assert response.status_code == 500
    assert response.json()["code"] == "internal"
    assert "secret" not in response.text
    assert "ZeroDivisionError" in caplog.text


async def test_a_request_that_does_not_fit_is_told_where(client: httpx.AsyncClient) -> None:
    response = await client.post("/number", json={"number": "many"})
    assert response.status_code == 422
    assert response.json()["errors"][0]["where"] == "body.number"


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("DELETE", "/number", 405)])
async def test_routing_errors_are_problems_too(client: httpx.AsyncClient, method: str, path: str, status: int) -> None:
    response = await client.request(method, path)
    assert response.status_code == status
    assert response.json()["status"] == status


async def test_a_request_id_that_is_no_id_is_replaced(client: httpx.AsyncClient) -> None:
    response = await client.get("/livez", headers={"x-request-id": 'x" injected'})
    assert response.headers["x-request-id"] != 'x" injected'


async def test_a_body_over_the_limit_is_refused_with_and_without_length(client: httpx.AsyncClient) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(11):
            yield b"x" * 100

    stated = await client.post("/length", content=b"x" * 1001)
    unstated = await client.post("/length", content=chunks())
    assert (stated.status_code, unstated.status_code) == (413, 413)
    assert unstated.json()["code"] == "body-too-large"
    assert (await client.post("/length", content=b"x" * 1000)).json() == 1000


@pytest.mark.parametrize(
    "headers",
    [{"host": "evil.example"}, {"origin": "https://evil.example"}, {"host": "127.0.0.1.evil.example"}],
)
async def test_pages_of_others_are_refused(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    response = await client.post("/number", json={"number": 1}, headers=headers)
    assert response.status_code == 403


async def test_our_own_origin_is_fine(client: httpx.AsyncClient) -> None:
    headers = {"host": "localhost:8080", "origin": "http://localhost:8080"}
    assert (await client.post("/number", json={"number": 1}, headers=headers)).status_code == 200


async def test_readiness_says_what_the_last_self_check_found() -> None:
    readiness = Readiness()
    async with asgi_client(make_app(readiness)) as client:
        first = await client.get("/readyz")
        readiness.passed()
        second = await client.get("/readyz")
        readiness.failed("golden inputs differ")
        third = await client.get("/readyz")
    assert (first.status_code, second.status_code, third.status_code) == (503, 200, 503)
    assert third.json()["reason"] == "golden inputs differ"


async def test_metrics_count_by_route_and_status(client: httpx.AsyncClient) -> None:
    await client.get("/full")
    await client.get("/a/path/that/nobody/made")
    text = (await client.get("/metrics")).text
    assert 'medloop_requests_total{method="GET",route="/full",status="507"} 1.0' in text
    assert 'route="unmatched"' in text


def test_nothing_is_open_by_default() -> None:
    check_exposure(AuthSettings(auth="loopback"), "127.0.0.1")
    check_exposure(AuthSettings(auth="proxy"), "0.0.0.0")
    with pytest.raises(Forbidden, match="access control"):
        check_exposure(AuthSettings(auth="loopback"), "0.0.0.0")


@pytest.mark.parametrize("headers", [{"host": "["}, {"origin": "http://["}])
async def test_headers_that_are_no_address_are_refused(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    assert (await client.get("/metrics", headers=headers)).status_code == 403


async def test_invented_methods_share_one_label(client: httpx.AsyncClient) -> None:
    for number in range(3):
        await client.request(f"X{number}", "/full")
    text = (await client.get("/metrics")).text
    assert 'method="other"' in text
    assert "X0" not in text


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    body = (await receive())["body"]
    if body == b"full":
        raise Overloaded("Come back later.", retry_after=7)
    if body == b"broken":
        raise ZeroDivisionError
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"hello " + body})


async def test_a_bare_application_gets_all_that_routes_get() -> None:
    app = create_app(
        "test",
        ServerSettings(max_body_bytes=10),
        routers=[],
        readiness=Readiness(),
        direct={("POST", "/direct"): Direct(hello, "predict")},
    )
    async with asgi_client(app) as client:
        answer = await client.post("/direct", content=b"you", headers={"x-request-id": "abc-1"})
        refused = await client.post("/direct", content=b"full", headers={"x-request-id": "abc-2"})
        broken = await client.post("/direct", content=b"broken")
        large = await client.post("/direct", content=b"12345678901")
        foreign = await client.post("/direct", headers={"host": "evil.example"})
        other = await client.get("/direct")
        metrics = (await client.get("/metrics")).text
    assert (answer.text, answer.headers["x-request-id"]) == ("hello you", "abc-1")
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "7")
    assert refused.json()["request_id"] == "abc-2"
    assert refused.json()["instance"] == "/direct"
    assert (broken.status_code, broken.json()["code"]) == (500, "internal")
    assert (large.status_code, foreign.status_code, other.status_code) == (413, 403, 404)
    assert 'medloop_requests_total{method="POST",route="/direct",status="429"} 1.0' in metrics


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("POST", "/spoken/direct", b"you", {"host": "evil.example"}, 403),
        ("POST", "/spoken/direct", b"12345678901", {}, 413),
        ("POST", "/spoken/direct", b"full", {}, 429),
        ("POST", "/spoken/direct", b"broken", {}, 500),
        ("GET", "/spoken/nowhere", b"", {}, 404),
        ("POST", "/spoken", b"{}", {}, 405),
        ("GET", "/spoken", b"", {}, 503),
        ("PUT", "/spoken", b"{}", {}, 422),
    ],
)
async def test_whoever_refuses_says_so_in_the_words_of_the_protocol(
    method: str, path: str, body: bytes, headers: dict[str, str], status: int
) -> None:
    router = APIRouter()

    @router.get("/spoken")
    async def busy() -> None:
        raise Unavailable("Not now.")

    @router.put("/spoken")
    async def number(body: Body) -> int:
        return body.number

    app = create_app(
        "test",
        ServerSettings(max_body_bytes=10),
        routers=[router],
        readiness=Readiness(),
        direct={("POST", "/spoken/direct"): Direct(hello, "predict")},
        dialects={"spoken": lambda found: {"error": f"{found.status} {found.detail}"}},
    )
    async with asgi_client(app) as client:
        refused = await client.request(method, path, content=body, headers=headers)
        elsewhere = (await client.get("/spokenfor")).json()
    document = refused.json()
    assert (refused.status_code, refused.headers["content-type"]) == (status, "application/problem+json")
    assert document["error"] == f"{status} {document['detail']}"
    assert (elsewhere["status"], "error" in elsewhere) == (404, False)


async def test_a_streamed_body_may_be_of_any_size(client: httpx.AsyncClient) -> None:
    assert (await client.post("/streamed", content=bytes(5000))).json() == 5000
    assert (await client.post("/length", content=bytes(5000))).status_code == 413


async def test_every_error_is_described_as_a_problem_document(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    for path in document["paths"].values():
        for operation in path.values():
            assert list(operation["responses"]["default"]["content"]) == ["application/problem+json"]


async def test_bodies_that_are_being_sent_share_a_bound() -> None:
    app = make_app(max_body_bytes=100)
    gate = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield b"x" * 90
        await gate.wait()

    async with asgi_client(app) as client:
        senders = [asyncio.create_task(client.post("/length", content=slowly())) for _ in range(8)]
        while app.guard.held_bytes < 8 * 90:
            await asyncio.sleep(0.01)
        refused = await client.post("/length", content=b"y" * 90)
        assert (refused.status_code, refused.json()["code"], refused.headers["retry-after"]) == (429, "overloaded", "1")
        gate.set()
        await asyncio.gather(*senders)
        assert app.guard.held_bytes == 0
        assert (await client.post("/length", content=b"y" * 90)).status_code != 429


def test_a_fault_that_lasts_is_told_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    tell = Teller(60.0, clock=lambda: now)
    for second in range(130):
        now = float(second)
        tell(StorageFull("The disk is full."))
        tell(NotFound("Nothing here."))  # the caller's own
        if second == 3:
            tell(Unavailable("Nothing answers."))
    told = [(vars(record)["code"], vars(record)["passed_over"]) for record in caplog.records]
    assert told == [("storage-full", 0), ("unavailable", 0), ("storage-full", 59), ("storage-full", 59)]
