"""The page of a model's runs: every tab has content for a run that went through the whole loop."""

from collections.abc import Callable

import pytest
from streamlit.testing.v1 import AppTest

from ..fakes import Fakes
from ..studio import Studio

Page = Callable[[str], AppTest]
Texts = Callable[[AppTest], str]


@pytest.fixture
def opened(page: Page, studio: Studio) -> Callable[[str], AppTest]:
    """The page with one of its tabs open."""

    def make(tab: str) -> AppTest:
        app = page("runs")
        app.session_state["run_tabs"] = tab
        return app.run()

    return make


def charts(app: AppTest) -> int:
    return len(app.get("arrow_vega_lite_chart")) + len(app.get("vega_lite_chart"))


def test_lists_versions_with_their_main_metrics(opened: Callable[[str], AppTest], fakes: Fakes) -> None:
    table = opened("Metrics").dataframe[0].value
    assert table["Version"].tolist() == [3, 2, 1]
    accuracy = ["87.50 % (52.90 % to 97.80 %)", "not evaluated", "not evaluated"]
    assert table["Test accuracy (95 % interval)"].tolist() == accuracy
    assert table["Test AUC"][0] == "0.9375 (0.7000 to 1.0000)"


def test_metrics(opened: Callable[[str], AppTest], fakes: Fakes) -> None:
    app = opened("Metrics")
    assert not app.exception
    assert not app.error
    values = app.dataframe[1].value.set_index("Metric")["Value"]
    assert values["val_loss"] == "0.4"
    assert values["test_accuracy"] == "0.875"
    assert app.dataframe[2].value["Setting"].tolist() == ["architecture"]
    assert charts(app) == 2, "one of the loss, one of the accuracy"


def test_artifacts(opened: Callable[[str], AppTest], fakes: Fakes) -> None:
    app = opened("Artifacts")
    assert not app.exception
    paths = app.dataframe[1].value["File"].str.strip().tolist()
    assert {"bundle/", "model.onnx", "report.json"} <= set(paths)
    assert '"confusion"' in app.json[0].value
    app.selectbox(key="preview-3").select("evaluation/test/predictions.csv").run()
    assert app.dataframe[2].value["predicted"].tolist() == ["bright", "dark"]
    app.selectbox(key="preview-3").select("evaluation/test/misclassified/00_dark_as_bright.png").run()
    assert len(app.image) == 1
    app.selectbox(key="preview-3").select("bundle/model.onnx").run()
    assert "no preview" in app.info[0].value
    assert not app.exception


def test_evaluation(opened: Callable[[str], AppTest], fakes: Fakes, texts: Texts) -> None:
    app = opened("Evaluation")
    assert not app.exception
    assert not app.error
    metrics = app.dataframe[1].value.set_index("Metric")
    assert metrics.loc["Accuracy", "95 % interval"] == "52.90 % to 97.80 %"
    served = app.dataframe[2].value.set_index("Metric")
    assert list(served.loc["Referred to a person"]) == ["75.00 %", "40.90 % to 92.90 %", "wilson"]
    assert "8 calibration images set" in texts(app)
    assert app.dataframe[3].value["AUC"].tolist() == ["0.9375", "not defined"]
    assert app.dataframe[3].value["In the set"].tolist() == ["100.0 % (51.0 % to 100.0 %)", "not defined"]
    assert charts(app) == 1
    assert "dark called bright" in texts(app)
    assert "2 images exact" in texts(app)
    assert len(app.image) == 1


def test_explanations(opened: Callable[[str], AppTest], fakes: Fakes, texts: Texts) -> None:
    app = opened("Explanations")
    assert not app.exception
    assert not app.error
    assert "Integrated Gradients" in texts(app)
    assert "Called bright" in texts(app)
    assert "but is dark" in texts(app)
    assert len(app.image) == 3, "the image and two overlays"


def test_visualizations(opened: Callable[[str], AppTest], fakes: Fakes, texts: Texts) -> None:
    app = opened("Visualizations")
    assert not app.exception
    assert not app.error
    assert charts(app) == 3, "reliability, embeddings, classes"
    leaks = app.dataframe[1].value.set_index("Where")
    assert leaks.loc["all", "Exact duplicates"] == 1
    assert "40 images" in texts(app)


@pytest.mark.parametrize(
    ("tab", "hint"),
    [("Evaluation", "medloop evaluate tiny 1"), ("Explanations", "medloop explain tiny 1"), ("Metrics", None)],
)
def test_a_run_that_was_only_trained(
    opened: Callable[[str], AppTest], fakes: Fakes, texts: Texts, tab: str, hint: str | None
) -> None:
    app = opened(tab)
    app.selectbox(key="version").select("1").run()
    assert not app.exception
    assert not app.error
    if hint:
        assert hint in texts(app)


def test_only_the_open_tab_is_read(opened: Callable[[str], AppTest], fakes: Fakes, texts: Texts) -> None:
    assert "Reliability" not in texts(opened("Metrics"))
