"""Navigation, and the notice under every page."""

from pathlib import Path
from typing import Any

import medloop_dashboard
import pytest
from medloop_dashboard.wording import NOT_A_DEVICE
from streamlit.testing.v1 import AppTest

from .fakes import Fakes

APP = Path(medloop_dashboard.__file__).with_name("app.py")


def test_opens_with_predict_and_says_that_it_is_no_medical_device(fakes: Fakes, page: Any) -> None:
    app = AppTest.from_file(str(APP), default_timeout=60).run()
    assert not app.exception
    assert app.title[0].value == "Predict"
    assert app.caption[-1].value == NOT_A_DEVICE


@pytest.mark.parametrize("source", sorted(APP.parent.rglob("*.py")), ids=lambda path: path.name)
def test_nothing_is_rendered_as_html(source: Path) -> None:
    code = source.read_text()
    assert "unsafe_allow_html" not in code
    assert "st.html" not in code
    assert "components.html" not in code
