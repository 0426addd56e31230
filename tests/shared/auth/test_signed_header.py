"""Signed headers against a load balancer's stand-in that really signs them and serves its keys, on loopback."""

import hmac
import json
import threading
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from medloop.auth import signed_header
from medloop.auth.principal import NoSigningKeys
from medloop.auth.signed_header import SignedHeader
from medloop.errors import Unauthenticated
from medloop.testing import LoadBalancer, public_pem

STRANGER = ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def balancer() -> Iterator[LoadBalancer]:
    with LoadBalancer().serving() as serving:
        yield serving


@pytest.fixture
def checker(balancer: LoadBalancer) -> SignedHeader:
    return SignedHeader(f"{balancer.url}/", balancer.signer, "medloop", "https://login.example")


@pytest.mark.parametrize("name", ["ann", "anna", "annie", "Änne Müller"])
def test_a_signed_header_says_who_somebody_is_whatever_its_padding(
    balancer: LoadBalancer, checker: SignedHeader, name: str
) -> None:
    token = balancer.token(sub=name)
    assert token.endswith("==")
    assert checker.check(token) == name


def test_client_and_issuer_are_compared_only_where_they_are_given(balancer: LoadBalancer) -> None:
    token = balancer.token(client="another", iss=None)
    assert SignedHeader(balancer.url, balancer.signer).check(token) == "ann"


def test_keys_are_read_once_and_outlive_the_address_being_away(balancer: LoadBalancer, checker: SignedHeader) -> None:
    checker.check(balancer.token())
    balancer.up = False
    assert checker.check(balancer.token(sub="bob")) == "bob"
    assert balancer.asked == [f"/{balancer.key_id}"]


def with_header(token: str, **changed: object) -> str:
    head, rest = token.split(".", 1)
    header = json.loads(urlsafe_b64decode(head)) | changed
    return f"{urlsafe_b64encode(json.dumps(header).encode()).decode()}.{rest}"


def signed_with_what_is_public(balancer: LoadBalancer) -> str:
    signed = balancer.token(alg="HS256").rpartition(".")[0]
    secret = balancer.keys[f"/{balancer.key_id}"]
    return f"{signed}.{urlsafe_b64encode(hmac.digest(secret, signed.encode(), 'sha256')).decode()}"


def spliced(token: str, other: str) -> str:
    head, _, signature = token.split(".")
    return f"{head}.{other.split('.')[1]}.{signature}"


BAD: dict[str, Callable[[LoadBalancer], str]] = {
    "a stranger's signature": lambda b: b.token(STRANGER),
    "a changed body": lambda b: spliced(b.token(), b.token(sub="bob")),
    "a changed header": lambda b: with_header(b.token(), exp=int(time.time()) + 9999),
    "padding taken off": lambda b: b.token(sub="anna").replace("=", ""),
    "another's load balancer": lambda b: b.token(signer=f"{b.signer[:-1]}0"),
    "no signer": lambda b: b.token(signer=None),
    "another client": lambda b: b.token(client="other"),
    "another issuer": lambda b: b.token(iss="https://evil.example"),
    "expired": lambda b: b.token(exp=int(time.time()) - 60),
    "no expiry": lambda b: b.token(exp=None),
    "expiry is text": lambda b: b.token(exp="9999999999"),
    "expiry is no number": lambda b: b.token(exp=float("nan")),
    "none": lambda b: b.token(alg="none"),
    "none, and no signature": lambda b: b.token(alg="none").rpartition(".")[0] + ".",
    "the public key as a secret": signed_with_what_is_public,
    "another algorithm": lambda b: b.token(alg="ES384"),
    "a number for a name": lambda b: b.token(sub=7),
    "an empty name": lambda b: b.token(sub=" "),
    "a name of two lines": lambda b: b.token(sub="ann\nadmin"),
    "a long name": lambda b: b.token(sub="a" * 201),
    "missing": lambda _: "",
    "no token": lambda _: "ann",
    "a list for a header": lambda _: f"{urlsafe_b64encode(b'[1]').decode()}.e30=.AAAA",
    "half a byte": lambda _: "a.b.c",
    "something behind": lambda b: f"{b.token()}!!!!",
    "a fourth part": lambda b: f"{b.token()}.AAAA",
    "a line behind": lambda b: f"{b.token()}\n",
    "half a signature": lambda b: b.token()[:-44],
    "huge": lambda b: b.token(sub="a" * 100_000),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_tokens_are_refused(balancer: LoadBalancer, checker: SignedHeader, bad: str) -> None:
    with pytest.raises(Unauthenticated):
        checker.check(BAD[bad](balancer))


@pytest.mark.parametrize(
    "key_id",
    [
        None,
        7,
        "",
        "../secret",
        "00000000-0000-4000-8000-000000000001/../secret",
        "00000000-0000-4000-8000-00000000000/",
        "00000000-0000-4000-8000-000000000001?x",
        "00000000-0000-4000-8000-000000000001\n",
        "//evil.example/00000000-0000-4000-8000-000000000001",
        "https://evil.example",
    ],
)
def test_a_key_id_that_is_none_never_gets_into_an_address(
    balancer: LoadBalancer, checker: SignedHeader, key_id: object
) -> None:
    with pytest.raises(Unauthenticated, match="names no key"):
        checker.check(balancer.token(kid=key_id))
    assert balancer.asked == []


def test_without_keys_nobody_is_let_in_and_they_are_not_asked_for_all_the_time(
    balancer: LoadBalancer, checker: SignedHeader, monkeypatch: pytest.MonkeyPatch
) -> None:
    balancer.up = False
    for _ in range(3):
        with pytest.raises(NoSigningKeys, match="cannot be read"):
            checker.check(balancer.token())
    assert len(balancer.asked) == 1
    balancer.up = True
    monkeypatch.setattr(signed_header, "RETRY_SECONDS", 0.0)
    other = SignedHeader(balancer.url, balancer.signer)
    balancer.up = False
    with pytest.raises(NoSigningKeys):
        other.check(balancer.token())
    balancer.up = True
    assert other.check(balancer.token()) == "ann"


def test_each_of_several_keys_that_cannot_be_read_is_remembered(
    balancer: LoadBalancer, checker: SignedHeader, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [f"00000000-0000-4000-8000-{number:012}" for number in (2, 3, 4)]

    def ask(key_id: str) -> None:
        with pytest.raises(NoSigningKeys):
            checker.check(balancer.token(kid=key_id))

    for key_id in (*ids, *ids):
        ask(key_id)
    assert balancer.asked == [f"/{key_id}" for key_id in ids]
    monkeypatch.setattr(signed_header, "CACHED_KEYS", 3)
    ask("00000000-0000-4000-8000-000000000005")
    ask(ids[2])
    ask(ids[0])  # the oldest, which made room
    assert balancer.asked[3:] == ["/00000000-0000-4000-8000-000000000005", f"/{ids[0]}"]


def test_a_key_whose_reading_hangs_holds_up_no_other_token(
    balancer: LoadBalancer, checker: SignedHeader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signed_header, "FETCH_SECONDS", 60.0)
    made_up, asked, answering = "00000000-0000-4000-8000-000000000002", threading.Event(), threading.Event()

    class Keys(dict[str, bytes]):
        def get(self, path: str, default: object = None) -> bytes | None:  # type: ignore[override]
            if path.endswith(made_up):
                asked.set()
                assert answering.wait(60)
            return super().get(path)

    balancer.keys = Keys(balancer.keys)

    def ask() -> None:
        with pytest.raises(NoSigningKeys):
            checker.check(balancer.token(kid=made_up))

    with ThreadPoolExecutor(2) as threads:
        hanging = threads.submit(ask)
        assert asked.wait(60)
        try:
            assert threads.submit(checker.check, balancer.token()).result(60) == "ann"
            assert not hanging.done()
        finally:
            answering.set()
        hanging.result(60)


def test_nobody_listening_is_no_reason_to_believe(balancer: LoadBalancer) -> None:
    with LoadBalancer().serving() as gone:
        address = gone.url
    with pytest.raises(NoSigningKeys):
        SignedHeader(address, balancer.signer).check(balancer.token())


@pytest.mark.parametrize("published", [b"no key", public_pem(ec.generate_private_key(ec.SECP384R1()))])
def test_what_is_no_key_of_the_algorithm_is_not_used(
    balancer: LoadBalancer, checker: SignedHeader, published: bytes
) -> None:
    balancer.keys[f"/{balancer.key_id}"] = published
    with pytest.raises(NoSigningKeys):
        checker.check(balancer.token())
