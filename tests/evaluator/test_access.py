"""Who may ask the evaluator for what."""

from pathlib import Path

import pytest
from medloop.auth import OPEN_PATHS, AuthSettings
from medloop.auth.keys import ApiKeys
from medloop.http import App, route_scopes
from medloop.storage.records import RecordStore
from medloop.testing import asgi_client
from medloop_evaluator.app import create_app
from medloop_evaluator.settings import EvaluatorSettings

OPERATION = {"/metrics", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}
"""Need credentials, and no scope."""


@pytest.fixture
def app(home: Path, records: RecordStore, tracking_uri: str) -> App:
    return create_app(EvaluatorSettings(auth=AuthSettings(auth="keys")))


def test_every_route_says_what_it_needs(app: App) -> None:
    silent = {path for (_, path), scopes in route_scopes(app.routes).items() if not scopes}
    assert silent <= OPEN_PATHS | OPERATION
    changing = {path for (_, path), scopes in route_scopes(app.routes).items() if "approve" in scopes}
    assert changing == {"/approvals", "/rollback"}


@pytest.mark.anyio
async def test_approvals_are_signed_in_ones_own_name(app: App, records: RecordStore) -> None:
    keys = ApiKeys(records)
    ann, judge = keys.issue("ann", ["approve"]).text, keys.issue("judge", ["evaluate"]).text
    async with asgi_client(app) as client:

        async def ask(path: str, key: str, **more: object) -> tuple[int, str]:
            body = {"model": "tiny", "version": "1", "approver": "bob", **more}
            answer = await client.post(path, json=body, headers={"authorization": f"Bearer {key}"})
            return answer.status_code, answer.json().get("scope") or answer.json().get("field", "")

        assert await ask("/approvals", judge) == (403, "approve")
        assert await ask("/approvals", ann) == (403, "approver")
        assert (await ask("/approvals", ann, approver="ann"))[0] == 404  # hers, but there is no such model
        answer = await client.post(
            "/rollback", json={"model": "tiny", "approver": "bob"}, headers={"authorization": f"Bearer {ann}"}
        )
        assert (answer.status_code, answer.json()["field"]) == (403, "approver")
