"""Access as callers meet it: over HTTP, with keys on real records."""

import asyncio
import logging
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from fastapi import APIRouter
from medloop.auth import AuthSettings, check_signed, principal, throttle
from medloop.auth.keys import KIND, ApiKeys
from medloop.http import App, Direct, Readiness, create_app, require
from medloop.settings import ServerSettings
from medloop.storage.records import RecordStore
from medloop.testing import asgi_client
from pydantic import ValidationError
from starlette.types import Receive, Scope, Send

pytestmark = pytest.mark.anyio


@pytest.fixture
def keys(records: RecordStore) -> ApiKeys:
    return ApiKeys(records)


async def whoami(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["medloop.principal"].effective.encode()})


def make_app(**settings: object) -> App:
    router = APIRouter()

    @router.get("/me", dependencies=[require("predict")])
    def me() -> dict[str, object]:
        who = principal.get()  # in another thread than the guard's
        assert who is not None
        return {"name": who.name, "effective": who.effective, "key_id": who.key_id}

    @router.post("/sign/{name}", dependencies=[require("approve")])
    def sign(name: str) -> str:
        check_signed(name, "approver")
        return name

    silent = APIRouter()

    @silent.get("/undeclared")
    def undeclared() -> str:
        return "seen"

    chosen = AuthSettings.model_validate({"auth": "keys", "keys_seconds": 0.05, **settings})
    direct = {("GET", "/direct"): Direct(whoami, "predict")}
    return create_app(
        "test", ServerSettings(), routers=[router, silent], readiness=Readiness(), auth=chosen, direct=direct
    )


@asynccontextmanager
async def asking(app: App, key: str | None = None, **headers: str) -> AsyncIterator[httpx.AsyncClient]:
    async with asgi_client(app, "http://service.example") as client:
        client.headers.update({**({"authorization": f"Bearer {key}"} if key else {}), **headers})
        yield client


async def test_only_three_paths_are_open(keys: ApiKeys) -> None:
    key = keys.issue("clinic", ["predict"]).text
    async with asking(make_app()) as client:
        opened = [(await client.get(path)).status_code for path in ("/livez", "/readyz", "/ping")]
        closed = [await client.get(p) for p in ("/me", "/direct", "/metrics", "/docs", "/openapi.json", "/nothing")]
        client.headers["authorization"] = f"bearer {key}"
        found = [(await client.get(p)).status_code for p in ("/me", "/direct", "/metrics", "/docs", "/openapi.json")]
    assert opened == [200, 503, 404]  # not ready yet, and no service here has /ping
    assert {answer.status_code for answer in closed} == {401}
    assert {answer.headers["www-authenticate"] for answer in closed} == {"Bearer"}
    assert found == [200] * 5


async def test_a_scope_that_is_missing_is_named(keys: ApiKeys) -> None:
    async with asking(make_app(), keys.issue("clinic", ["explain"]).text) as client:
        answers = [await client.get("/me"), await client.get("/direct"), await client.get("/undeclared")]
    assert [answer.status_code for answer in answers] == [403, 403, 403]
    assert [answer.json()["scope"] for answer in answers] == ["predict", "predict", "admin"]


async def test_wrong_keys_are_refused_and_never_logged(
    keys: ApiKeys, caplog: pytest.LogCaptureFixture, home: Path
) -> None:
    good = keys.issue("clinic", ["predict"])
    other = keys.issue("other", ["predict"])
    swapped = f"mlk_{good.key.id}_{other.text.rpartition('_')[2]}"
    expired = keys.issue("gone", ["predict"], lasts=timedelta(seconds=-1)).text
    with caplog.at_level(logging.DEBUG):
        async with asking(make_app()) as client:
            for wrong in (good.text[:-1], good.text + "x", swapped, expired, "mlk_", "mlk_x_y", "a.b.c", "é", "mlk__"):
                answer = await client.get("/me", headers={b"authorization": f"Bearer {wrong}".encode()})
                assert answer.status_code == 401, wrong
            assert (await client.get("/me", headers={"authorization": f"Basic {good.text}"})).status_code == 401
            assert (
                await client.get("/me", params={"api_key": good.text, "access_token": good.text})
            ).status_code == 401
            await client.get("/me", headers={"authorization": f"Bearer {good.text}"})
            metrics = (await client.get("/metrics", headers={"authorization": f"Bearer {good.text}"})).text
    secret = good.text.split("_", 2)[2]
    # The client of this test logs the address that it was told to call.
    logged = "".join(map(str, (vars(record) for record in caplog.records if record.name != "httpx")))
    assert secret not in logged + metrics
    kept = home / "keys" / "api-keys.json"
    assert secret not in kept.read_text()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


async def soon(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await condition():
            await asyncio.sleep(0.02)


async def test_services_share_keys_and_a_revoked_one_ends_everywhere(keys: ApiKeys) -> None:
    key = keys.issue("clinic", ["predict"])
    async with asking(make_app(), key.text) as one, asking(make_app(), key.text) as two:
        assert [(await c.get("/me")).status_code for c in (one, two)] == [200, 200]
        keys.revoke("clinic")
        later = {"authorization": f"Bearer {keys.issue('later', ['predict']).text}"}
        for client in (one, two):

            async def is_out(client: httpx.AsyncClient = client) -> bool:
                return (await client.get("/me")).status_code == 401

            async def is_in(client: httpx.AsyncClient = client) -> bool:
                answer = await client.get("/me", headers=later)
                return answer.status_code == 200 and answer.json()["name"] == "later"

            await soon(is_out)
            await soon(is_in)


async def test_records_that_are_down_stop_neither_checks_nor_a_restart(
    keys: ApiKeys, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = keys.issue("clinic", ["predict"]).text
    async with asking(make_app(), key) as client:
        assert (await client.get("/me")).status_code == 200
    blocked = home / "blocked"
    blocked.write_text("a file where a folder should be")
    monkeypatch.setenv("MEDLOOP_RECORDS_URL", f"sqlite:///{blocked / 'records.sqlite'}")
    app = make_app()
    async with asking(app, key) as client:
        assert (await client.get("/me")).status_code == 200

        async def is_told() -> bool:
            return "api-keys" in app.access.problems

        await soon(is_told)
        await asyncio.sleep(0.2)  # in which it is tried again, and not told
        assert (await client.get("/me")).status_code == 200
        assert "api-keys" in app.access.problems
        assert "medloop_access_degraded 1.0" in (await client.get("/metrics")).text
    assert caplog.text.count("cannot be read anew") == 1  # not once every few seconds
    (home / "keys" / "api-keys.json").write_text("{")
    async with asking(make_app(), key) as client:
        answer = await client.get("/me")
    assert (answer.status_code, answer.json()["code"]) == (503, "storage-unavailable")


async def test_one_damaged_record_locks_nobody_out(keys: ApiKeys, records: RecordStore) -> None:
    key = keys.issue("clinic", ["predict"]).text
    records.put_once(KIND, "ffffffffffff", {"id": "ffffffffffff", "name": "x", "status": "active"})
    async with asking(make_app(), key) as client:
        assert (await client.get("/me")).status_code == 200


async def test_a_key_has_a_rate_of_its_own(keys: ApiKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttle, "time", SimpleNamespace(monotonic=lambda: 0.0))  # no bucket fills meanwhile
    slow, usual = keys.issue("slow", ["predict"], rate=2).text, keys.issue("usual", ["predict"]).text
    async with asking(make_app(rate=1000.0), slow) as client:
        answers = [await client.get("/direct") for _ in range(5)]
        fine = [
            (await client.get("/direct", headers={"authorization": f"Bearer {usual}"})).status_code for _ in range(20)
        ]
    assert [answer.status_code for answer in answers] == [200, 200, 429, 429, 429]
    assert answers[-1].headers["retry-after"] == "1"
    assert set(fine) == {200}


async def test_who_guesses_is_slowed_and_their_neighbours_are_not(keys: ApiKeys) -> None:
    key = keys.issue("clinic", ["predict"]).text
    async with asking(make_app()) as client:
        wrong = [(await client.get("/me", headers={"authorization": "Bearer mlk_0_0"})).status_code for _ in range(22)]
        right = await client.get("/me", headers={"authorization": f"Bearer {key}"})
    assert wrong == [401] * 20 + [429] * 2
    assert right.status_code == 200


async def test_acting_as_somebody_needs_the_scope(keys: ApiKeys) -> None:
    dashboard, clinic = keys.issue("dashboard", ["predict", "act-as"]), keys.issue("clinic", ["predict"])
    named = {"x-medloop-act-as": "J%C3%BCrgen Ott"}
    async with asking(make_app(), dashboard.text, **named) as client:
        assert (await client.get("/direct")).text == "Jürgen Ott"
        answer = (await client.get("/me")).json()
        bad = await client.get("/me", headers={"x-medloop-act-as": "%0A"})
        refused = await client.get("/me", headers={"authorization": f"Bearer {clinic.text}"})
    assert answer == {"name": "dashboard", "effective": "Jürgen Ott", "key_id": dashboard.key.id}
    assert bad.status_code == 400
    assert (refused.status_code, refused.json()["scope"]) == (403, "act-as")


async def test_nobody_signs_in_anothers_name(keys: ApiKeys, home: Path) -> None:
    key = keys.issue("ann", ["approve", "act-as"]).text
    async with asking(make_app(), key) as client:
        own, other = await client.post("/sign/ann"), await client.post("/sign/bob")
        acting = await client.post("/sign/bob", headers={"x-medloop-act-as": "bob"})
    assert (own.status_code, other.status_code, acting.status_code) == (200, 403, 200)
    assert "'ann'" in other.json()["detail"]
    async with asgi_client(make_app(auth="loopback")) as client:  # where nobody is known, people say who they are
        assert (await client.post("/sign/bob")).status_code == 200


async def test_behind_a_proxy_everything_is_trusted(home: Path) -> None:
    async with asking(make_app(auth="proxy")) as client:
        assert (await client.get("/undeclared")).json() == "seen"


@pytest.mark.parametrize("auth", ["", "none", "keys,proxy", "loopback,keys", "keys,keys", "proxy,loopback", "oidc"])
def test_settings_that_mean_nothing_are_refused(auth: str) -> None:
    with pytest.raises(ValidationError):
        AuthSettings(auth=auth)


async def test_a_route_cannot_declare_a_scope_that_is_none() -> None:
    with pytest.raises(ValueError, match="fly"):
        require("fly")


def test_openapi_says_which_routes_need_credentials(home: Path) -> None:
    document = make_app().openapi()
    assert document["paths"]["/me"]["get"]["security"] == [{"bearer": []}]
    assert "security" not in document["paths"]["/livez"]["get"]


async def test_a_service_that_never_read_its_keys_is_not_ready_until_it_has(
    keys: ApiKeys, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys.issue("clinic", ["predict"])
    kept, blocked = home / "records.sqlite", home / "blocked"
    blocked.write_text("a file where a folder should be")
    monkeypatch.setenv("MEDLOOP_RECORDS_URL", f"sqlite:///{blocked / 'records.sqlite'}")
    app = make_app()
    app.readiness.passed()
    async with asking(app) as client:
        down = await client.get("/readyz")
        blocked.unlink()
        blocked.symlink_to(kept.parent, target_is_directory=True)

        async def is_up() -> bool:
            return (await client.get("/readyz")).status_code == 200

        await soon(is_up)
    assert (down.status_code, down.json()["reason"]) == (
        503,
        "API keys cannot be checked yet: the records do not answer",
    )
