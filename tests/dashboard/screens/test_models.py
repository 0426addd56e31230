"""The page that approves and rolls back."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from medloop.schemas import RefusedVersion
from streamlit.testing.v1 import AppTest

from ..fakes import HOSTILE, Fakes
from ..studio import Studio

Page = Callable[[str], AppTest]
Texts = Callable[[AppTest], str]


def button(app: AppTest, label: str) -> Any:
    return next(found for found in app.button if found.label == label)


def test_shows_versions_served_model_and_timeline(page: Page, fakes: Fakes, studio: Studio, texts: Texts) -> None:
    fakes.served = fakes.served.model_copy(
        update={"refused": [RefusedVersion(version="9", reason="it is not approved", at=datetime.now(UTC))]}
    )
    app = page("models").run()
    assert not app.exception
    assert not app.error
    table = app.dataframe[0].value
    assert table["Version"].tolist() == [3, 2, 1]
    assert table["Alias"].tolist() == ["challenger", "champion", "previous"]
    assert table["Test accuracy (95 % interval)"].tolist() == [
        "87.50 % (52.90 % to 97.80 %)",
        "not evaluated",
        "not evaluated",
    ]
    assert "**tiny version 1**" in texts(app)
    assert "not approved" in app.warning[0].value
    timeline = app.dataframe[1].value
    assert timeline["Who"].tolist() == ["Ada", "bootstrap"]
    assert timeline["Reason"][0] == HOSTILE


def test_approving_takes_gate_name_and_confirmation(page: Page, fakes: Fakes, studio: Studio) -> None:
    app = page("models").run()
    assert app.selectbox(key="approve-version").value == "3", "the challenger is offered first"
    assert button(app, "Approve version 3").disabled
    app.text_input(key="approver").input("Grace").run()
    app.checkbox(key="confirm-3").check().run()
    assert button(app, "Approve version 3").disabled, "the gate was not asked yet"
    button(app, "Compare with the champion").click().run()
    button(app, "Approve version 3").click().run()
    assert [(a.version, a.approver, a.override, a.champion) for a in fakes.approvals] == [("3", "Grace", None, "2")]
    assert "Approved version 3" in app.success[0].proto.title
    app.run()
    assert len(fakes.approvals) == 1
    assert not app.success


def test_a_failed_gate_needs_a_reason(page: Page, fakes: Fakes, studio: Studio) -> None:
    fakes.outcome = "fail"
    app = page("models").run()
    button(app, "Compare with the champion").click().run()
    assert "Failed" in app.error[0].proto.title
    app.text_input(key="approver").input("Grace").run()
    app.checkbox(key="confirm-3").check().run()
    assert button(app, "Approve version 3").disabled
    app.text_area(key="override-3").input("New scanner; the old one is gone").run()
    button(app, "Approve version 3").click().run()
    assert fakes.approvals[0].override == "New scanner; the old one is gone"


def test_a_refused_approval_is_not_claimed(page: Page, fakes: Fakes, studio: Studio) -> None:
    app = page("models").run()
    button(app, "Compare with the champion").click().run()
    app.text_input(key="approver").input("Grace").run()
    app.checkbox(key="confirm-3").check().run()
    fakes.outcome = "fail"  # in the meantime somebody else approved a better one
    button(app, "Approve version 3").click().run()
    assert not any("Approved" in message.proto.title for message in app.success)
    assert "The gate failed" in app.error[0].value
    assert not fakes.approvals


def test_rolling_back_takes_name_reason_and_confirmation(page: Page, fakes: Fakes, studio: Studio) -> None:
    app = page("models").run()
    assert button(app, "Roll back to version 1").disabled
    app.text_input(key="rollback-approver").input("Grace").run()
    app.text_area(key="rollback-reason").input("It calls dark images bright").run()
    app.checkbox(key="back-1").check().run()
    button(app, "Roll back to version 1").click().run()
    assert [(r.model, r.approver, r.reason, r.champion) for r in fakes.rollbacks] == [
        ("tiny", "Grace", "It calls dark images bright", "2")
    ]
    assert "Rolled back to version 1" in app.success[0].proto.title


def test_whom_the_proxy_signed_in_approves_and_rolls_back(
    page: Page, fakes: Fakes, studio: Studio, signed_in: str
) -> None:
    app = page("models").run()
    assert [(field.value, field.disabled) for field in app.text_input] == [(signed_in, True)] * 2
    app.text_area(key="rollback-reason").input("It calls dark images bright").run()
    app.checkbox(key="back-1").check().run()
    button(app, "Roll back to version 1").click().run()
    assert [rolled.approver for rolled in fakes.rollbacks] == [signed_in]


def test_without_a_model_it_says_what_to_do(page: Page, fakes: Fakes, tracking_uri: str) -> None:
    app = page("models").run()
    assert not app.exception
    assert "medloop train" in app.info[0].value


def test_without_mlflow_it_says_what_to_do(page: Page, fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    app = page("models").run()
    assert not app.exception
    assert app.error[0].proto.title == "The registry cannot be read"
    assert "MLflow does not answer" in app.error[0].value
