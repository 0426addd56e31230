from medloop.auth import AuthSettings
from medloop_dashboard.connections import signed_in


def test_only_a_proxy_may_say_who_looks_at_the_page() -> None:
    headers = {"X-Forwarded-User": "ann"}
    assert signed_in(AuthSettings(auth="proxy"), headers) == "ann"
    assert signed_in(AuthSettings(auth="proxy"), {}) is None
    assert signed_in(AuthSettings(), headers) is None
