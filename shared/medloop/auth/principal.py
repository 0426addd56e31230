"""Who a request is from, what it may do, and in whose name."""

from contextvars import ContextVar
from dataclasses import dataclass

from medloop.errors import Forbidden, Unauthenticated, Unavailable

ACT_AS = "act-as"
SCOPES = frozenset({"predict", "explain", "evaluate", "correct", "approve", "admin", ACT_AS})
"""None implies another. `act-as` lets a service, such as the dashboard, say for which person it asks."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks: the name on an API key, or the person whom a token is about."""

    name: str
    scopes: frozenset[str]
    key_id: str | None = None
    acting_as: str | None = None
    """The person whom a service with scope `act-as` asks for."""
    authenticated: bool = True

    @property
    def effective(self) -> str:
        """In whose name this request acts."""
        return self.acting_as or self.name

    def need(self, scope: str) -> None:
        """Raise Forbidden without `scope`."""
        if scope not in self.scopes:
            raise Forbidden(
                f"This needs the scope {scope}, which {self.name} does not have; ask who issues your credentials.",
                scope=scope,
            )


ANONYMOUS = Principal("anonymous", SCOPES, authenticated=False)
"""Whoever is on this machine, or came through the proxy."""

principal: ContextVar[Principal | None] = ContextVar("principal", default=None)
"""Who the present request is from; None outside of one."""


def check_signed(name: str, field: str) -> None:
    """Raise Forbidden when the present request names somebody else in `field`, which says who answers for it."""
    who = principal.get()
    if who is not None and who.authenticated and name != who.effective:
        raise Forbidden(
            f"Nobody signs in another's name: you are known here as {who.effective!r}, so {field} must be that.",
            field=field,
        )


class UnknownSigningKey(Unauthenticated):
    """A token that may be fine once the identity provider's keys are read anew."""


class NoSigningKeys(Unavailable):
    """Nobody's token can be checked until the identity provider's keys are read."""
