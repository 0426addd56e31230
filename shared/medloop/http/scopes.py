"""How routes declare what a caller must be allowed to do.

router = APIRouter(dependencies=[require("explain")])          # all its routes

@router.post("/approvals", dependencies=[require("approve")])  # one route
"""

from collections.abc import Sequence
from typing import Any

from fastapi import Depends, Request
from fastapi.dependencies.models import Dependant
from fastapi.openapi.models import HTTPBearer
from fastapi.routing import iter_route_contexts
from fastapi.security.base import SecurityBase
from starlette.routing import BaseRoute

from medloop.auth import SCOPES, Principal

PRINCIPAL = "medloop.principal"
"""Where the guard puts the `Principal` into the ASGI scope."""


class _Needs(SecurityBase):
    """The dependency of one route; OpenAPI shows it as bearer authentication."""

    model = HTTPBearer(description="An API key of MedLoop, or a token of the identity provider.")
    scheme_name = "bearer"

    def __init__(self, scope: str) -> None:
        self.scope = scope

    async def __call__(self, request: Request) -> Principal:
        who: Principal = request.scope[PRINCIPAL]
        who.need(self.scope)
        return who


def require(scope: str) -> Any:
    """A dependency that answers 403 without `scope` (one of `SCOPES`), and otherwise gives the `Principal`."""
    if scope not in SCOPES:
        raise ValueError(f"{scope} is none of {sorted(SCOPES)}")
    return Depends(_Needs(scope))


def route_scopes(routes: Sequence[BaseRoute]) -> dict[tuple[str, str], frozenset[str]]:
    """Which scopes each method and path needs, all of them; no scope where a route declares none."""
    found: dict[tuple[str, str], frozenset[str]] = {}
    for route in iter_route_contexts(routes):
        dependant = getattr(route, "dependant", None)
        scopes = frozenset(_found(dependant) if dependant is not None else ())
        found |= {(method, str(route.path)): scopes for method in route.methods or ()}
    return found


def _found(dependant: Dependant) -> list[str]:
    own = [dependant.call.scope] if isinstance(dependant.call, _Needs) else []
    return own + [scope for inner in dependant.dependencies for scope in _found(inner)]
