import pytest
from medloop.auth import AuthSettings
from medloop_dashboard.connections import signed_in
from medloop_dashboard.settings import DashboardSettings


def test_only_a_proxy_may_say_who_looks_at_the_page() -> None:
    header = DashboardSettings().user_header
    headers = {"X-Forwarded-User": "ann"}
    assert signed_in(AuthSettings(auth="proxy"), header, headers) == "ann"
    assert signed_in(AuthSettings(auth="proxy"), header, {}) is None
    assert signed_in(AuthSettings(), header, headers) is None


def test_only_the_header_that_was_named_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDLOOP_USER_HEADER", "x-amzn-oidc-identity")
    header = DashboardSettings().user_header
    forged = {"X-Forwarded-User": "the head of AI"}
    assert signed_in(AuthSettings(auth="proxy"), header, forged) is None
    assert signed_in(AuthSettings(auth="proxy"), header, forged | {"x-amzn-oidc-identity": "ann"}) == "ann"
