"""Bearer tokens of an OpenID Connect provider: signed JWTs (RFC 7519, checked as RFC 8725 and RFC 9068 advise).

The provider's public keys are found by discovery (OpenID Connect Discovery 1.0) and read anew in the background. Only
RS256 and ES256 are taken: a key that is public must never be used as the secret of HS256, and `none` is no signature.
"""

import hashlib
import json
import logging
import threading
import time
from base64 import urlsafe_b64decode
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from joserfc import jwt
from joserfc.errors import ExpiredTokenError, JoseError
from joserfc.jwk import ECKey, RSAKey

from medloop.auth.principal import SCOPES, NoSigningKeys, Principal, UnknownSigningKey
from medloop.auth.settings import AuthSettings, check_secure
from medloop.errors import Unauthenticated

logger = logging.getLogger(__name__)

ALGORITHMS = ["RS256", "ES256"]
LEEWAY_SECONDS = 30
"""By how much clocks may differ."""
REFRESH_SECONDS = 600.0
RETRY_SECONDS = 10.0
"""Between two readings of the keys, whatever tokens come: unknown key ids cost nothing to invent."""
CACHED_TOKENS = 1024
_MAX_DOCUMENT = 2**20
_MAX_TOKEN = 16 * 2**10


@dataclass(frozen=True, slots=True)
class Caller:
    principal: Principal
    subject: str
    expires: float


class Tokens:
    """Checks tokens of one issuer for one audience. `problem` says why keys may be missing; None when they are not."""

    def __init__(self, settings: AuthSettings) -> None:
        self.settings = settings
        self.issuer = settings.oidc_issuer or ""
        self.problem: str | None = None
        self._registry = jwt.JWTClaimsRegistry(
            leeway=LEEWAY_SECONDS,
            iss={"essential": True, "value": self.issuer},
            aud={"essential": True, "value": settings.oidc_audience or ""},
            exp={"essential": True},
            sub={"essential": True},
        )
        self._keys: dict[str, RSAKey | ECKey] = {}
        self._read_at: float | None = None
        self._reading = threading.Lock()
        self._cache: OrderedDict[bytes, Caller] = OrderedDict()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Read the provider's keys, and follow them from now on."""
        self._thread = threading.Thread(target=self._follow, name="oidc-keys", daemon=True)
        self._thread.start()

    def begin_stop(self) -> None:
        """Read no more; does not wait for a reading that is under way."""
        self._stop.set()

    def stop(self, timeout: float = 1.0) -> None:
        """End; a reading that takes longer than `timeout` seconds is given up, since nothing is lost with it."""
        self.begin_stop()
        if self._thread is not None:
            self._thread.join(timeout)

    @property
    def unready_reason(self) -> str | None:
        """Why no token can be checked, as long as the provider's keys were never read."""
        return None if self._keys else "tokens cannot be checked yet: the identity provider does not answer"

    def check(self, token: str) -> Caller:
        """Who the token is about.

        Raises Unauthenticated for one that is not good; UnknownSigningKey and NoSigningKeys where reading the keys
        may help.
        """
        mark = hashlib.sha256(token.encode()).digest()
        known = self._cache.get(mark)
        if known is None:
            known = self._cache[mark] = self._check(token)
            if len(self._cache) > CACHED_TOKENS:
                self._cache.popitem(last=False)
        if time.time() >= known.expires + LEEWAY_SECONDS:
            raise _expired()
        return known

    @property
    def due(self) -> bool:
        """Whether `refresh` would read: not when that was done a moment ago."""
        return self._read_at is None or time.monotonic() - self._read_at >= RETRY_SECONDS

    def refresh(self) -> None:
        """Read the provider's keys, if that is due."""
        with self._reading:
            if not self.due:
                return
            try:
                keys = self._fetch()
            except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError, AttributeError) as exc:
                if self.problem is None:
                    logger.warning("the keys of the identity provider cannot be read: %s", type(exc).__name__)
                self.problem = f"The identity provider's keys cannot be read ({type(exc).__name__})."
                return
            finally:
                self._read_at = time.monotonic()
            self._keys, self.problem = keys, None
            self._cache = OrderedDict()  # a key that was withdrawn takes its tokens with it

    def _follow(self) -> None:
        while not self._stop.is_set():
            try:
                self.refresh()
            except Exception:
                logger.exception("reading the identity provider's keys failed unexpectedly")
                self.problem = "Reading the identity provider's keys failed unexpectedly; the log says more."
            self._stop.wait(RETRY_SECONDS if self.problem else REFRESH_SECONDS)

    def _fetch(self) -> dict[str, RSAKey | ECKey]:
        with httpx.Client(timeout=5.0) as http:
            found = _read_json(http, f"{self.issuer.rstrip('/')}/.well-known/openid-configuration")
            if found["issuer"] != self.issuer:
                raise ValueError("the discovery document is another issuer's")
            check_secure(found["jwks_uri"])
            listed = _read_json(http, found["jwks_uri"])["keys"]
        return {str(entry.get("kid", "")): key for entry in listed if (key := _public_key(entry)) is not None}

    def _check(self, token: str) -> Caller:
        key = self._key_of(_header(token))
        try:
            claims = jwt.decode(token, key, algorithms=ALGORITHMS).claims
            self._registry.validate(claims)
        except ExpiredTokenError as exc:
            raise _expired() from exc
        except Exception as exc:
            # Any part of a stranger's token may be of any type, and joserfc looks at some before it has checked that.
            raise _refused() from exc
        name = claims.get(self.settings.oidc_name_claim)
        if not isinstance(name, str) or not 0 < len(name.strip()) <= 200:
            raise Unauthenticated(f"The token does not say who it is about: it needs {self.settings.oidc_name_claim}.")
        return Caller(Principal(name.strip(), self._scopes(claims)), str(claims["sub"]), float(claims["exp"]))

    def _key_of(self, header: Mapping[str, Any]) -> RSAKey | ECKey:
        if header.get("alg") not in ALGORITHMS:
            raise _refused()
        keys = self._keys
        if not keys:
            raise NoSigningKeys("Tokens cannot be checked yet: the identity provider does not answer. Try again soon.")
        if "kid" not in header and len(keys) == 1:
            return next(iter(keys.values()))
        key = keys.get(str(header.get("kid")))
        if key is None:
            raise UnknownSigningKey("The token is signed with a key that its issuer does not publish.")
        return key

    def _scopes(self, claims: Mapping[str, Any]) -> frozenset[str]:
        granted: set[str] = set()
        for path in self.settings.oidc_scope_claims.split(","):
            for word in _words(claims, path.strip()):
                granted |= {word, *self.settings.oidc_roles.get(word, "").split()}
        return frozenset(granted & SCOPES)


def _read_json(http: httpx.Client, url: str) -> dict[str, Any]:
    response = http.get(url)
    response.raise_for_status()
    document = json.loads(response.content) if len(response.content) <= _MAX_DOCUMENT else None
    if not isinstance(document, dict):
        raise ValueError(f"{url} has no JSON object of a fair size")
    return document


def _public_key(entry: Mapping[str, Any]) -> RSAKey | ECKey | None:
    """A key that may sign tokens; None for any other that the provider publishes."""
    if entry.get("use", "sig") != "sig" or entry.get("alg", ALGORITHMS[0]) not in ALGORITHMS:
        return None
    try:
        match entry.get("kty"):
            case "RSA":
                rsa = RSAKey.import_key({name: entry[name] for name in ("kty", "n", "e")})
                return rsa if rsa.raw_value.key_size >= 2048 else None
            case "EC" if entry.get("crv") == "P-256":
                return ECKey.import_key({name: entry[name] for name in ("kty", "crv", "x", "y")})
    except (JoseError, ValueError, KeyError):
        logger.warning("a key of the identity provider is damaged")
    return None


def _header(token: str) -> dict[str, Any]:
    if len(token) > _MAX_TOKEN:
        raise _refused()
    text = token.partition(".")[0]
    try:
        header = json.loads(urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (ValueError, RecursionError) as exc:
        raise _refused() from exc
    if not isinstance(header, dict):
        raise _refused()
    return header


def _words(claims: Mapping[str, Any], path: str) -> list[str]:
    value: Any = claims
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if isinstance(value, str):
        return value.split()
    return [word for word in value if isinstance(word, str)] if isinstance(value, list) else []


def _refused() -> Unauthenticated:
    return Unauthenticated("The token is not valid here: not signed as it must be, or issued for somebody else.")


def _expired() -> Unauthenticated:
    return Unauthenticated("The token has expired; sign in again.")
