"""API keys: issued, rotated and revoked as records, so that every replica of every service learns of it.

A key reads `mlk_<id>_<secret>`. The secret is 256 random bits and only its SHA-256 is stored: slow hashes exist for
secrets that can be guessed, and nobody guesses 256 random bits however fast the hash is, while every request would
pay for a slow one.
"""

import hashlib
import hmac
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from medloop.auth.principal import SCOPES, Principal
from medloop.errors import Conflict, InvalidRequest, NotFound, StorageUnavailable
from medloop.schemas import Person, now
from medloop.settings import said
from medloop.storage.records import Record, RecordStore, scan

KIND = "api_keys"
PREFIX = "mlk_"
SECRET_CHARACTERS = 43
"""Of 256 random bits in base 64; as many hexadecimal digits still are 172 bits."""


class Digest(BaseModel):
    """SHA-256 (hex) of a secret; after a rotation the old one holds `until` then."""

    model_config = ConfigDict(frozen=True)

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    until: datetime | None = None


class ApiKey(BaseModel):
    """What is on record of a key: nothing that lets anybody in. `rate` is in requests a second."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    schema_version: Literal[1] = 1
    id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{12}$")]
    name: Person
    scopes: list[str]
    rate: float | None = Field(default=None, gt=0)
    status: Literal["active", "revoked"] = "active"
    created_at: datetime = Field(default_factory=now)
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    digests: list[Digest]

    @cached_property
    def principal(self) -> Principal:
        """Who calls with it."""
        return Principal(self.name, frozenset(self.scopes), self.id)

    def opened_by(self, secret: str, at: datetime) -> bool:
        """Whether `secret` is this key's, compared in constant time."""
        given = digest(secret)
        return any(
            hmac.compare_digest(one.sha256, given) and (one.until is None or at < one.until) for one in self.digests
        )


@dataclass(frozen=True, slots=True, repr=False)
class Issued:
    """A key and its text, which exists here and with its owner only."""

    key: ApiKey
    text: str

    def __repr__(self) -> str:
        return f"Issued(key={self.key.id}, text='{PREFIX}…')"


class ApiKeys:
    """The keys on record."""

    def __init__(self, records: RecordStore) -> None:
        self.records = records

    def issue(
        self, name: str, scopes: Sequence[str], *, lasts: timedelta | None = None, rate: float | None = None
    ) -> Issued:
        """A new key. Raises InvalidRequest for what cannot be, and Conflict when `name` has a key: two that share a
        name could sign for each other."""
        if unknown := set(scopes) - SCOPES:
            raise InvalidRequest(f"There is no scope {', '.join(sorted(unknown))}; choose from {_listed(SCOPES)}.")
        if not scopes:
            raise InvalidRequest(f"A key needs scopes; choose from {_listed(SCOPES)}.")
        return self._put(secrets.token_hex(6), _new_secret(), name, scopes, lasts, rate)

    def adopt(self, text: str, name: str, scopes: Sequence[str]) -> ApiKey:
        """The key with this text, which a deployment made up itself so that it need not read it from a log; put on
        record unless it is. Raises InvalidRequest for a text that no key has, and Conflict when it is not `name`'s any
        more."""
        key_id, secret = split(text) or ("", "")
        if not _is_id(key_id) or len(secret) < SECRET_CHARACTERS:
            raise InvalidRequest(
                f"The given API key must read {PREFIX}<12 hex digits>_<at least {SECRET_CHARACTERS} random characters>."
            )
        record = self.records.get(KIND, key_id)
        if record is None:
            return self._put(key_id, secret, name, scopes, None, None).key
        key = _read(record)
        if key.name != name or key.status != "active" or not key.opened_by(secret, now()):
            raise Conflict(f"Key {key_id} was revoked, rotated or given to another; make up a new one for {name}.")
        return key

    def _put(
        self, key_id: str, secret: str, name: str, scopes: Sequence[str], lasts: timedelta | None, rate: float | None
    ) -> Issued:
        if self.records.find(KIND, {"name": name, "status": "active"}, limit=1).items:
            raise Conflict(f"{name} has a key already; rotate or revoke that one.")
        issued_at = now()
        try:
            key = ApiKey(
                id=key_id,
                name=name,
                scopes=sorted(set(scopes)),
                rate=rate,
                created_at=issued_at,
                expires_at=issued_at + lasts if lasts else None,
                digests=[Digest(sha256=digest(secret))],
            )
        except ValidationError as exc:
            first = exc.errors()[0]
            raise InvalidRequest(f"The key's {first['loc'][0]} cannot be: {said(first)}.") from exc
        if not self.records.put_once(KIND, key.id, key.model_dump(mode="json")):
            raise Conflict("The new key's id is taken; try again.")
        return Issued(key, f"{PREFIX}{key.id}_{secret}")

    def all(self) -> list[ApiKey]:
        """Every key there ever was, newest first."""
        found = [_read(record) for record in scan(self.records, KIND)]
        return sorted(found, key=lambda key: key.created_at, reverse=True)

    def rotate(self, named: str, grace: timedelta = timedelta()) -> Issued:
        """A new secret for a key, named by id or name; the old one goes on working for `grace`."""
        secret = _new_secret()

        def change(key: ApiKey) -> ApiKey:
            if key.status != "active":
                raise Conflict(f"Key {key.id} was revoked; issue a new one.")
            until = now() + grace
            old = [one.model_copy(update={"until": min(one.until or until, until)}) for one in key.digests]
            kept = old if grace else []
            return key.model_copy(update={"digests": [Digest(sha256=digest(secret)), *kept[:1]]})

        key = self._change(named, change)
        return Issued(key, f"{PREFIX}{key.id}_{secret}")

    def revoke(self, named: str) -> ApiKey:
        """End a key, named by id or name, for good; doing so again changes nothing."""

        def change(key: ApiKey) -> ApiKey:
            if key.status == "revoked":
                return key
            return key.model_copy(update={"status": "revoked", "revoked_at": now(), "digests": []})

        return self._change(named, change)

    def _change(self, named: str, change: Callable[[ApiKey], ApiKey]) -> ApiKey:
        record = self._find(named)
        changed = change(_read(record))
        if not self.records.compare_and_set(KIND, record.id, record.revision, changed.model_dump(mode="json")):
            raise Conflict(f"Somebody else changed key {record.id} at the same time; look at it and try again.")
        return changed

    def _find(self, named: str) -> Record:
        items = self.records.find(KIND, {"name": named, "status": "active"}, limit=2).items
        if len(items) > 1:
            raise Conflict(f"Several keys are called {named}; name one by its id (medloop keys list).")
        record = items[0] if items else (self.records.get(KIND, named) if _is_id(named) else None)
        if record is None:
            raise NotFound(f"There is no key {named}; medloop keys list shows those there are.")
        return record


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def split(text: str) -> tuple[str, str] | None:
    """The id and the secret of a key's text; None when it is none."""
    key_id, _, secret = text.removeprefix(PREFIX).partition("_")
    return (key_id, secret) if text.startswith(PREFIX) and secret else None


def _new_secret() -> str:
    return secrets.token_urlsafe(32)


def _is_id(named: str) -> bool:
    return len(named) == 12 and all(c in "0123456789abcdef" for c in named)


def _listed(scopes: frozenset[str]) -> str:
    return ", ".join(sorted(scopes))


def _read(record: Record) -> ApiKey:
    try:
        return ApiKey.model_validate(record.document)
    except ValidationError as exc:
        raise StorageUnavailable(f"The record of key {record.id} is damaged; issue a new key in its place.") from exc
