"""Who may ask inference for what."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from medloop.auth import OPEN_PATHS, AuthSettings
from medloop.auth.keys import ApiKeys
from medloop.bundle import Bundle
from medloop.http import App, route_scopes
from medloop.settings import HomeSettings
from medloop.storage.records import RecordStore
from medloop.testing import asgi_client
from medloop_inference.app import create_app
from medloop_inference.settings import ServingSettings, Settings

OPERATION = {"/metrics", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}
"""Need credentials, and no scope."""


@pytest.fixture
def app(home: Path, records: RecordStore, tracking_uri: str) -> App:
    return create_app(Settings(serving=ServingSettings(model="tiny"), auth=AuthSettings(auth="keys")))


def test_every_route_says_what_it_needs(app: App) -> None:
    needed = route_scopes(app.routes)
    assert {path for (_, path), scopes in needed.items() if not scopes} <= OPEN_PATHS | OPERATION
    correcting = {path for (_, path), scopes in needed.items() if "correct" in scopes}
    assert correcting == {"/v1/predictions/{prediction_id}/correction", "/v1/corrections"}


@pytest.mark.anyio
async def test_the_hot_path_is_guarded_and_records_who_asked(
    app: App, records: RecordStore, evaluator: Any, first: Bundle, grey: Callable[..., bytes]
) -> None:
    keys = ApiKeys(records)
    asker, other = keys.issue("ward 7", ["predict"]).text, keys.issue("reader", ["correct"]).text
    evaluator.champion(first)
    async with asgi_client(app) as client:
        service = app.state.service
        service.watcher.poll_once()

        async def ask(**headers: str) -> int:
            sent = {"content-type": "image/png", **headers}
            return (await client.post("/v1/predict", content=grey(3), headers=sent)).status_code

        assert await ask() == 401
        assert await ask(authorization="Bearer mlk_wrong_key") == 401
        assert await ask(authorization=f"Bearer {other}") == 403
        assert await ask(authorization=f"Bearer {asker}") == 200
        service.recorder.stop()
        (record,) = records.find("predictions").items
        assert record.document["caller"] == "ward 7"

        form = {"label": "dark", "author": "somebody else"}
        path = f"/v1/predictions/{record.id}/correction"
        answer = await client.post(path, data=form, headers={"authorization": f"Bearer {other}"})
        assert (answer.status_code, answer.json()["field"]) == (403, "author")
    assert (HomeSettings().keys_dir / "api-keys.json").stat().st_mode & 0o077 == 0


@pytest.mark.anyio
@pytest.mark.parametrize(("path", "member"), [("/v2/models/tiny/infer", "error"), ("/invocations", "message")])
async def test_other_protocols_hear_in_their_own_words_that_they_may_not(
    app: App, records: RecordStore, path: str, member: str
) -> None:
    reader = ApiKeys(records).issue("reader", ["correct"]).text
    async with asgi_client(app) as client:
        unknown = await client.post(path, content=b"")
        refused = await client.post(path, content=b"", headers={"authorization": f"Bearer {reader}"})
    assert (unknown.status_code, unknown.headers["www-authenticate"], refused.status_code) == (401, "Bearer", 403)
    assert unknown.json()[member] == unknown.json()["detail"]
    assert "the scope predict" in refused.json()[member]
