"""Tokens against a provider that really serves its discovery document and keys, on loopback."""

import hmac
import json
import threading
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import ECKey, RSAKey
from medloop.auth import AuthSettings, oidc
from medloop.auth.oidc import Tokens
from medloop.auth.principal import UnknownSigningKey
from medloop.errors import MedLoopError, Unauthenticated, Unavailable
from medloop.http import Readiness, create_app
from medloop.settings import ServerSettings
from medloop.testing import asgi_client
from pydantic import ValidationError

RSA = RSAKey.generate_key(2048, {"kid": "rsa"})
EC = ECKey.generate_key("P-256", {"kid": "ec"})
STRANGER = RSAKey.generate_key(2048, {"kid": "rsa"})


class Provider:
    """An identity provider: what it publishes, and how often it was asked."""

    def __init__(self, port: int) -> None:
        self.issuer = f"http://127.0.0.1:{port}"
        self.keys: list[dict[str, Any]] = [dict(RSA.as_dict(private=False)), dict(EC.as_dict(private=False))]
        self.asked = 0
        self.up = True

    def token(self, key: Any = RSA, alg: str = "RS256", kid: str | None = "rsa", **claims: Any) -> str:
        given = {"iss": self.issuer, "aud": "medloop", "sub": "u-1", "exp": int(time.time()) + 60, "scope": "predict"}
        kept = {name: value for name, value in {**given, **claims}.items() if value is not None}
        header = {"alg": alg} | ({"kid": kid} if kid else {})
        return jwt.encode(header, kept, key, algorithms=[alg])


@pytest.fixture
def provider() -> Iterator[Provider]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.asked += 1
            documents = {
                "/.well-known/openid-configuration": {"issuer": found.issuer, "jwks_uri": f"{found.issuer}/keys"},
                "/keys": {"keys": found.keys},
            }
            body = json.dumps(documents.get(self.path)).encode()
            self.send_response(200 if found.up and self.path in documents else 503)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Provider(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


def settings(provider: Provider, **more: Any) -> AuthSettings:
    given = {"auth": "oidc", "oidc_issuer": provider.issuer, "oidc_audience": "medloop", **more}
    return AuthSettings.model_validate(given)


@pytest.fixture
def tokens(provider: Provider) -> Tokens:
    checker = Tokens(settings(provider))
    checker.refresh()
    return checker


def test_good_tokens_say_who_asks_and_what_for(provider: Provider, tokens: Tokens) -> None:
    found = tokens.check(provider.token(scope="openid predict correct fly"))
    assert (found.principal.name, found.principal.scopes) == ("u-1", frozenset({"predict", "correct"}))
    by_list = tokens.check(
        provider.token(EC, "ES256", "ec", scope=None, roles=["approve", 7], aud=["other", "medloop"])
    )
    assert by_list.principal.scopes == {"approve"}


def test_names_and_roles_are_read_where_the_settings_say(provider: Provider) -> None:
    more = {
        "oidc_name_claim": "email",
        "oidc_scope_claims": "realm.roles",
        "oidc_roles": {"radiologist": "predict correct"},
    }
    checker = Tokens(settings(provider, **more))
    checker.refresh()
    found = checker.check(provider.token(email="ann@x", realm={"roles": ["radiologist", "cook"]}, scope="admin"))
    assert (found.principal.name, found.principal.scopes) == ("ann@x", frozenset({"predict", "correct"}))
    with pytest.raises(Unauthenticated, match="email"):
        checker.check(provider.token(realm={"roles": []}))


def unsigned(provider: Provider) -> str:
    body = provider.token().split(".")[1]
    none = urlsafe_b64encode(json.dumps({"alg": "none", "kid": "rsa"}).encode()).decode().rstrip("=")
    return f"{none}.{body}."


def signed_with_what_is_public(provider: Provider) -> str:
    """By hand: the library would not sign so."""
    body = provider.token().split(".")[1]
    head = urlsafe_b64encode(json.dumps({"alg": "HS256", "kid": "rsa"}).encode()).decode().rstrip("=")
    signature = hmac.digest(RSA.as_pem(private=False), f"{head}.{body}".encode(), "sha256")
    return f"{head}.{body}.{urlsafe_b64encode(signature).decode().rstrip('=')}"


def with_header(token: str, **more: Any) -> str:
    head, rest = token.split(".", 1)
    header = json.loads(urlsafe_b64decode(head + "==")) | more
    return f"{urlsafe_b64encode(json.dumps(header).encode()).decode().rstrip('=')}.{rest}"


def spliced(token: str, other: str) -> str:
    head, _, signature = token.split(".")
    return f"{head}.{other.split('.')[1]}.{signature}"


BAD: dict[str, Callable[[Provider], str]] = {
    "expired": lambda p: p.token(exp=int(time.time()) - 60),
    "no expiry": lambda p: p.token(exp=None),
    "expiry is text": lambda p: p.token(exp="tomorrow"),
    "not yet": lambda p: p.token(nbf=int(time.time()) + 600),
    "another audience": lambda p: p.token(aud="other"),
    "no audience": lambda p: p.token(aud=None),
    "another issuer": lambda p: p.token(iss="https://evil.example"),
    "nobody": lambda p: p.token(sub=None),
    "a stranger's signature": lambda p: p.token(STRANGER),
    "a changed body": lambda p: spliced(p.token(), p.token(sub="u-2")),
    "none": unsigned,
    "the public key as a secret": signed_with_what_is_public,
    "another algorithm": lambda p: p.token(RSA, "PS256"),
    "the other key's kid": lambda p: p.token(RSA, "RS256", "ec"),
    "no kid among several keys": lambda p: p.token(kid=None),
    "cut off": lambda p: p.token()[:-5],
    "empty parts": lambda _: "..",
    "no token": lambda _: "nothing",
    "a list for a header": lambda _: urlsafe_b64encode(b"[1]").decode() + ".e.e",
    "critical is a number": lambda p: with_header(p.token(), crit=5),
    "critical is nothing known": lambda p: with_header(p.token(), crit=["fly"]),
    "type is a list": lambda p: with_header(p.token(), typ=[1], b64={}),
    "huge": lambda _: "a" * 100_000,
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_tokens_are_refused(provider: Provider, tokens: Tokens, bad: str) -> None:
    with pytest.raises(Unauthenticated):
        tokens.check(BAD[bad](provider))


def test_a_token_that_was_good_expires_though_it_is_remembered(
    provider: Provider, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = provider.token()
    tokens.check(token)
    monkeypatch.setattr(oidc, "time", SimpleNamespace(time=lambda: time.time() + 120, monotonic=time.monotonic))
    with pytest.raises(Unauthenticated, match="expired"):
        tokens.check(token)


def test_no_keys_is_no_refusal(provider: Provider) -> None:
    provider.up = False
    checker = Tokens(settings(provider))
    checker.refresh()
    with pytest.raises(Unavailable):
        checker.check(provider.token())
    assert checker.problem is not None
    assert checker.unready_reason is not None
    provider.up = True
    known = Tokens(settings(provider))
    known.refresh()
    assert known.unready_reason is None


def test_weak_and_foreign_keys_are_not_used(provider: Provider) -> None:
    provider.keys = [{"kty": "oct", "k": "c2VjcmV0", "kid": "rsa"}, {"kty": "RSA", "kid": "x"}, *provider.keys[1:]]
    checker = Tokens(settings(provider))
    checker.refresh()
    with pytest.raises(UnknownSigningKey):
        checker.check(provider.token())
    assert checker.check(provider.token(EC, "ES256", "ec")).subject == "u-1"


@pytest.mark.anyio
async def test_a_new_key_is_fetched_once_and_inventing_ids_fetches_nothing(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app("test", ServerSettings(), routers=[], readiness=Readiness(), auth=settings(provider))
    async with asgi_client(app) as client:

        async def status(token: str) -> int:
            return (await client.get("/metrics", headers={"authorization": f"Bearer {token}"})).status_code

        assert await status(provider.token()) == 200
        new = RSAKey.generate_key(2048, {"kid": "new"})
        provider.keys.append(dict(new.as_dict(private=False)))
        asked = provider.asked
        assert [await status(provider.token(STRANGER, kid=f"invented-{i}")) for i in range(3)] == [401] * 3
        assert provider.asked == asked  # it was read a moment ago
        monkeypatch.setattr(oidc, "RETRY_SECONDS", 0.0)
        assert await status(provider.token(new, kid="new")) == 200
        assert await status("mlk_0_0") == 401


@pytest.mark.parametrize("issuer", ["http://idp.example", "ftp://127.0.0.1", "idp.example"])
def test_an_issuer_without_tls_is_refused(issuer: str) -> None:
    with pytest.raises(ValidationError, match="https"):
        AuthSettings(auth="oidc", oidc_issuer=issuer, oidc_audience="medloop")


def test_a_discovery_document_of_another_issuer_is_not_believed(provider: Provider) -> None:
    issuer = provider.issuer
    checker = Tokens(settings(provider))
    provider.issuer = "https://evil.example"
    checker.refresh()
    provider.issuer = issuer
    with pytest.raises(MedLoopError):
        checker.check(provider.token())
