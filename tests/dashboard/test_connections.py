"""Who looks at a page, as the proxy in front says."""

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from medloop.auth import AuthSettings, signed_header
from medloop.errors import StorageUnavailable, Unauthenticated, Unavailable
from medloop.testing import LoadBalancer
from medloop_dashboard import connections
from medloop_dashboard.connections import Connections, signed_in
from medloop_dashboard.settings import DashboardSettings
from pydantic import ValidationError

PROXY = AuthSettings(auth="proxy")
DATA = "x-amzn-oidc-data"


@pytest.fixture
def balancer() -> Iterator[LoadBalancer]:
    connections._open_checker.cache_clear()
    with LoadBalancer().serving() as serving:
        yield serving


def signed(balancer: LoadBalancer) -> DashboardSettings:
    return DashboardSettings(user_token_header=DATA, user_token_signer=balancer.signer, user_token_keys=balancer.url)


def test_only_a_proxy_may_say_who_looks_at_the_page() -> None:
    headers = {"X-Forwarded-User": "ann"}
    assert signed_in(PROXY, DashboardSettings(), headers, {}) == "ann"
    assert signed_in(PROXY, DashboardSettings(), {}, {}) is None
    assert signed_in(AuthSettings(), DashboardSettings(), headers, {}) is None


def test_only_the_header_that_was_named_is_believed() -> None:
    settings = DashboardSettings(user_header="x-amzn-oidc-identity")
    forged = {"X-Forwarded-User": "the head of AI"}
    assert signed_in(PROXY, settings, forged, {}) is None
    assert signed_in(PROXY, settings, forged | {"x-amzn-oidc-identity": "ann"}, {}) == "ann"


def test_where_a_load_balancer_signs_nothing_else_is_believed(balancer: LoadBalancer) -> None:
    settings = signed(balancer)
    plain = {"X-Forwarded-User": "the head of AI", "x-amzn-oidc-identity": "the head of AI"}
    assert signed_in(PROXY, settings, plain | {DATA: balancer.token()}, {}) == "ann"
    for headers in (plain, plain | {DATA: ""}, plain | {DATA: balancer.token(signer="arn:aws:another")}):
        with pytest.raises(Unauthenticated):
            signed_in(PROXY, settings, headers, {})


def test_the_plain_header_is_no_way_out_while_keys_cannot_be_read(balancer: LoadBalancer) -> None:
    balancer.up = False
    headers = {"X-Forwarded-User": "ann", DATA: balancer.token()}
    with pytest.raises(Unavailable, match="cannot be read"):
        signed_in(PROXY, signed(balancer), headers, {})


def test_a_page_that_stays_open_outlives_what_opened_it_for_a_shift(
    balancer: LoadBalancer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its headers stay those that its connection began with."""
    settings, headers = signed(balancer), {DATA: balancer.token()}
    session: dict[str, Any] = {}
    signed_in(PROXY, settings, headers, session)
    hours = 1

    def later(clock: float) -> float:
        return clock + hours * 3600

    moved = SimpleNamespace(time=lambda: later(time.time()), monotonic=lambda: later(time.monotonic()))
    monkeypatch.setattr(signed_header, "time", moved)
    monkeypatch.setattr(connections, "time", moved)
    assert signed_in(PROXY, settings, headers, session) == "ann"
    with pytest.raises(Unauthenticated, match="expired"):
        signed_in(PROXY, settings, headers, {})
    hours = 13
    with pytest.raises(Unauthenticated, match="Reload"):
        signed_in(PROXY, settings, headers, session)
    bob = {DATA: balancer.token(sub="bob", exp=int(later(time.time())) + 120)}
    assert signed_in(PROXY, settings, bob, session) == "bob"


@pytest.mark.parametrize(
    "given",
    [
        {"user_token_header": DATA},
        {"user_token_header": DATA, "user_token_signer": "arn:…"},
        {"user_token_signer": "arn:…", "user_token_keys": "https://keys.example"},
        {"user_token_client": "medloop"},
        {"user_token_header": DATA, "user_token_signer": "arn:…", "user_token_keys": "http://keys.example"},
        {"user_token_header": "", "user_token_signer": "", "user_token_keys": ""},
    ],
)
def test_half_a_setting_is_not_taken_for_none(given: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        DashboardSettings.model_validate(given)


@pytest.mark.usefixtures("hanging_s3")
def test_a_page_is_told_in_time_that_objects_hang() -> None:
    opened = Connections.open()
    began = time.monotonic()
    with pytest.raises(StorageUnavailable):
        opened.objects.get("key")
    assert time.monotonic() - began < 30  # S3 alone would be waited for two minutes
    opened.close()
