"""The list of corrections."""

from collections.abc import Callable

import pytest
from medloop.storage.objects import ObjectStore
from medloop.testing import free_port
from streamlit.testing.v1 import AppTest

from ..fakes import HOSTILE, PNG, Fakes, correction

Page = Callable[[str], AppTest]


def test_lists_corrections_with_their_images(page: Page, fakes: Fakes, objects: ObjectStore) -> None:
    objects.put(f"images/aa/{'a' * 64}", PNG)
    fakes.corrections = [correction(comment=HOSTILE), correction(status="accepted")]
    app = page("corrections").run()
    assert not app.exception
    assert not app.warning
    table = app.dataframe[0].value
    assert table["Image"].str.startswith("data:image/png;base64,").all()
    assert table["Status"].tolist() == ["pending", "accepted"]
    assert table["Comment"][0] == HOSTILE


def test_filters_by_status(page: Page, fakes: Fakes) -> None:
    fakes.corrections = [correction(), correction(status="accepted")]
    app = page("corrections").run()
    app.session_state["status"] = "accepted"
    app.run()
    assert app.dataframe[0].value["Status"].tolist() == ["accepted"]
    app.session_state["status"] = "rejected"
    assert "No correction is rejected" in app.run().info[0].value


def test_a_missing_image_is_said_and_the_list_stays(page: Page, fakes: Fakes) -> None:
    fakes.corrections = [correction()]
    app = page("corrections").run()
    assert len(app.dataframe[0].value) == 1
    assert "cannot be shown" in app.warning[0].value


def test_without_inference_it_says_what_to_do(page: Page, fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDLOOP_INFERENCE_URL", f"http://127.0.0.1:{free_port()}")
    app = page("corrections").run()
    assert not app.exception
    assert app.error[0].proto.title == "Corrections cannot be read"
    assert "medloop up" in app.error[0].value
