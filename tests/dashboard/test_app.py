"""Navigation, and the notice under every page."""

from pathlib import Path
from typing import Any

import medloop_dashboard
import pytest
from medloop.testing import LoadBalancer
from medloop_dashboard.wording import NOT_A_DEVICE
from streamlit.runtime.context import ContextProxy
from streamlit.testing.v1 import AppTest

from .fakes import Fakes

APP = Path(medloop_dashboard.__file__).with_name("app.py")


def test_opens_with_predict_and_says_that_it_is_no_medical_device(fakes: Fakes, page: Any) -> None:
    app = AppTest.from_file(str(APP), default_timeout=60).run()
    assert not app.exception
    assert app.title[0].value == "Predict"
    assert app.caption[-1].value == NOT_A_DEVICE


def test_shows_nothing_to_whom_the_load_balancer_does_not_vouch_for(
    fakes: Fakes, page: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LoadBalancer().serving() as balancer:
        monkeypatch.setenv("MEDLOOP_AUTH", "proxy")
        monkeypatch.setenv("MEDLOOP_USER_TOKEN_HEADER", "x-amzn-oidc-data")
        monkeypatch.setenv("MEDLOOP_USER_TOKEN_SIGNER", balancer.signer)
        monkeypatch.setenv("MEDLOOP_USER_TOKEN_KEYS", balancer.url)
        monkeypatch.setattr(ContextProxy, "headers", {"X-Forwarded-User": "ann"})
        app = AppTest.from_file(str(APP), default_timeout=60).run()
        assert not app.exception
        assert [error.proto.title for error in app.error] == ["You cannot be let in"]
        assert not app.title
        monkeypatch.setattr(ContextProxy, "headers", {"x-amzn-oidc-data": balancer.token()})
        assert app.run().title[0].value == "Predict"
        assert not app.error


@pytest.mark.parametrize("source", sorted(APP.parent.rglob("*.py")), ids=lambda path: path.name)
def test_nothing_is_rendered_as_html(source: Path) -> None:
    code = source.read_text()
    assert "unsafe_allow_html" not in code
    assert "st.html" not in code
    assert "components.html" not in code
