"""Who may ask the explainer for what."""

from pathlib import Path

from medloop.auth import OPEN_PATHS
from medloop.http import route_scopes
from medloop_explainer.app import create_app
from medloop_explainer.settings import ExplainerSettings

OPERATION = {"/metrics", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}
"""Need credentials, and no scope."""


def test_every_route_says_what_it_needs(home: Path) -> None:
    found = route_scopes(create_app(ExplainerSettings()).routes)
    silent = {path for (_, path), scopes in found.items() if not scopes}
    assert silent <= OPEN_PATHS | OPERATION
    assert {scope for scopes in found.values() for scope in scopes} == {"explain"}
