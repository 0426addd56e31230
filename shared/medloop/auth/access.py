"""Who a request is from, and whether it may come in at all."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import unquote

from medloop.auth.exposure import check_request
from medloop.auth.keyring import KeyRing
from medloop.auth.keys import PREFIX
from medloop.auth.principal import ACT_AS, ANONYMOUS, NoSigningKeys, Principal, UnknownSigningKey
from medloop.auth.settings import AuthSettings
from medloop.auth.throttle import Buckets, Failures
from medloop.errors import InvalidRequest, Unauthenticated
from medloop.settings import HomeSettings, StorageSettings
from medloop.storage.records import open_records

if TYPE_CHECKING:
    from medloop.auth.oidc import Tokens

OPEN_PATHS = frozenset({"/livez", "/readyz", "/ping"})
ACT_AS_HEADER = "X-MedLoop-Act-As"
"""Holds a person's name, percent-encoded (RFC 3986) where it is not ASCII."""
KEYS_FILE = "api-keys.json"
_ACT_AS = ACT_AS_HEADER.lower().encode()


class Access:
    """What `settings` let in. It is started and stopped with the service."""

    def __init__(self, settings: AuthSettings) -> None:
        """Opens what it needs without touching the network."""
        self.settings = settings
        self.keys: KeyRing | None = None
        if settings.keys:
            records = open_records(StorageSettings().records_url)
            self.keys = KeyRing(records, HomeSettings().keys_dir / KEYS_FILE, settings.keys_seconds)
        self.tokens = _open_tokens(settings) if settings.oidc else None
        self._parts = [part for part in (self.keys, self.tokens) if part is not None]
        self._buckets = Buckets()
        self._failures = Failures()
        self._reading: asyncio.Task[None] | None = None

    @property
    def problems(self) -> dict[str, str]:
        """What the checks rest on that is out of reach, by name; for a service's own account of what is degraded."""
        parts = {"api-keys": self.keys, "oidc": self.tokens}
        return {name: part.problem for name, part in parts.items() if part is not None and part.problem is not None}

    @property
    def unready_reason(self) -> str | None:
        """Why API keys cannot be checked at all, or, where there are none, tokens; else None."""
        return self._parts[0].unready_reason if self._parts else None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        for part in self._parts:
            await asyncio.to_thread(part.start)
        try:
            yield
        finally:
            for part in self._parts:
                await asyncio.to_thread(part.stop)

    def begin_stop(self) -> None:
        """Have what runs in the background end, without waiting for it."""
        for part in self._parts:
            part.begin_stop()

    async def admit(self, headers: Mapping[bytes, bytes], address: str) -> Principal:
        """Who the request with these headers (names in lower case) is from.

        Raises Unauthenticated, Forbidden for a foreign page's request, RateLimited, or Unavailable when nothing can be
        checked yet.
        """
        if not (self.settings.keys or self.settings.oidc):
            if self.settings.loopback:
                check_request(headers)
            return _acting(ANONYMOUS, headers)
        token = _bearer(headers)
        try:
            try:
                who = self._identify(token)
            except (UnknownSigningKey, NoSigningKeys):
                await self._read_anew()
                who = self._identify(token)
        except Unauthenticated:
            self._failures.add(address)
            raise
        return _acting(who, headers)

    async def _read_anew(self) -> None:
        """Have the provider's keys read by one thread, however many requests wait for it."""
        if self.tokens is None or not self.tokens.due:
            return
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(asyncio.to_thread(self.tokens.refresh))
        await asyncio.shield(self._reading)

    def _identify(self, token: str) -> Principal:
        if token.startswith(PREFIX) and self.keys is not None:
            key = self.keys.check(token)
            caller, rate, who = key.id, key.rate or self.settings.rate, key.principal
        elif self.tokens is not None:
            found = self.tokens.check(token)
            caller, rate, who = f"oidc:{found.subject}", self.settings.rate, found.principal
        else:
            raise Unauthenticated("The credentials are no API key of MedLoop.")
        if rate is not None:
            self._buckets.take(caller, rate)
        return who


def _open_tokens(settings: AuthSettings) -> "Tokens":
    # Imported late: what checks signatures takes a quarter of a second to load, and few services need it.
    from medloop.auth.oidc import Tokens

    return Tokens(settings)


def _bearer(headers: Mapping[bytes, bytes]) -> str:
    """The credentials of the only scheme there is (RFC 6750 §2.1); those in an address would end up in logs."""
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() != b"bearer" or not token:
        raise Unauthenticated("This needs credentials: send Authorization: Bearer with an API key or a token.")
    if not token.isascii():
        raise Unauthenticated("The credentials are none: they have characters that neither key nor token has.")
    return token.strip().decode()


def _acting(who: Principal, headers: Mapping[bytes, bytes]) -> Principal:
    given = headers.get(_ACT_AS)
    if given is None:
        return who
    who.need(ACT_AS)
    name = unquote(given.decode("latin-1")).strip()
    if not 0 < len(name) <= 200 or not name.isprintable():
        raise InvalidRequest(f"{ACT_AS_HEADER} must be a name of 1 to 200 characters.")
    return replace(who, acting_as=name)
