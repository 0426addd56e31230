"""The real dashboard, in a real browser, against the real services.

`MEDLOOP_SCREENSHOTS` names a folder that keeps a picture of every page.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from medloop.clients import EvaluatorClient, InferenceClient
from medloop.storage.records import open_records
from medloop.vision.encode import encode_png
from medloop.vision.phantoms import CLASSES, phantom
from playwright.sync_api import Locator, Page, Request, expect, sync_playwright

from .conftest import RunningStack

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]  # the first test waits for the whole demo

WIDTH, HEIGHT = 1440, 1000  # px
ANSWER_SECONDS = 120  # the first explanation loads a network on a busy machine
SEED = 4711  # other images than any that the demo trains on
TABS = ("Metrics", "Artifacts", "Evaluation", "Explanations", "Visualizations")

ALL_CHARTS_DRAWN = """() => [...document.querySelectorAll('[data-testid=stVegaLiteChart]')].every(
  chart => [...chart.querySelectorAll('svg .role-mark > *')].some(mark => mark.getBoundingClientRect().width > 0)
)"""
"""Axes, titles and legends are not marks: bars, lines, points and squares are."""


class Dashboard:
    """One browser page, and what it must never do: show an error, or talk to anybody but the dashboard."""

    def __init__(self, page: Page, address: str, pictures: Path) -> None:
        self.page = page
        self.address = address
        self.pictures = pictures
        self.foreign: list[str] = []
        page.on("request", self._note)

    def open(self, path: str, title: str) -> None:
        self.page.goto(f"{self.address}/{path}")
        expect(self.page.get_by_role("heading", name=title, exact=True)).to_be_visible(timeout=60_000)
        self.settle()

    def settle(self) -> None:
        """Wait until Streamlit has run the page to its end: the notice stands at its foot."""
        expect(self.page.get_by_text("not a medical device")).to_be_visible(timeout=ANSWER_SECONDS * 1000)
        self.page.wait_for_timeout(300)  # a click reaches the server, and the page says that it runs
        app = self.page.get_by_test_id("stApp")
        expect(app).to_have_attribute("data-test-script-state", "notRunning", timeout=ANSWER_SECONDS * 1000)

    def check(self, name: str) -> None:
        """No error stands on the page, nobody else was asked, every chart is drawn; and keep a picture."""
        self.settle()
        expect(self.page.get_by_test_id("stException")).to_have_count(0)
        expect(self.page.get_by_test_id("stAlertContentError")).to_have_count(0)
        assert self.foreign == []
        self.page.wait_for_function(ALL_CHARTS_DRAWN)
        self._keep(name)

    def _note(self, request: Request) -> None:
        if not request.url.startswith((self.address, "data:", "blob:", self.address.replace("http", "ws", 1))):
            self.foreign.append(request.url)

    def _keep(self, name: str) -> None:
        # Streamlit scrolls inside the page: only a tall enough window shows all of it.
        height = self.page.get_by_test_id("stMain").evaluate("element => element.scrollHeight")
        self.page.set_viewport_size({"width": WIDTH, "height": max(HEIGHT, min(int(height), 8000))})
        self.page.wait_for_timeout(500)  # charts follow the new size
        self.page.screenshot(path=self.pictures / f"{name}.png")
        self.page.set_viewport_size({"width": WIDTH, "height": HEIGHT})


def cell(inside: Locator, text: str) -> Locator:
    """The cell of a table that says exactly this. Tables are canvases: what screen readers get is inside them."""
    return inside.locator("td", has_text=re.compile(rf"^\s*{re.escape(text)}\s*$"))


def choose(page: Page, label: str, option: str) -> None:
    box = page.get_by_role("combobox", name=label)
    # The list closes when the page scrolls: scroll first.
    box.scroll_into_view_if_needed()
    page.wait_for_timeout(500)
    box.click()
    page.get_by_role("option", name=option, exact=True).click()


@pytest.fixture(scope="module")
def dashboard(stack: RunningStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    named = os.environ.get("MEDLOOP_SCREENSHOTS")
    pictures = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    pictures.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=30_000)  # ms; the machine may be busy
    arguments = ["--disable-gpu", "--disable-background-networking", "--no-first-run"]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")  # Chromium's sandbox refuses to run as root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        yield Dashboard(page, stack.addresses["dashboard"], pictures)
        browser.close()


def test_upload_look_and_correct(stack: RunningStack, dashboard: Dashboard, tmp_path: Path) -> None:
    page = dashboard.page
    dashboard.open("", "Predict")
    file = tmp_path / "phantom.png"
    file.write_bytes(encode_png(phantom(CLASSES[0], 0, SEED)))
    page.locator("input[type=file]").set_input_files(file)
    expect(page.get_by_role("heading", name="Correct this answer")).to_be_visible()

    with InferenceClient(stack.addresses["inference"]) as inference:
        served = inference.served_model().model
        again = inference.predict(file.read_bytes(), cam=True)
    assert served is not None
    assert again.cam is not None
    # What the page says is what the service answers.
    answer = page.get_by_role("heading", name=re.compile(rf"^{again.label}, "))
    expect(answer).to_be_visible()
    expect(page.get_by_alt_text("The uploaded image")).to_be_visible()
    expect(page.get_by_text(f"{served.name} version {served.version}, onnxruntime float32")).to_be_visible()
    expect(page.get_by_text("coverage").first).to_be_visible()
    decision = "Accepted" if again.decision == "accept" else "Refer to a person"
    expect(page.get_by_text(decision, exact=True).first).to_be_visible()
    expect(page.get_by_text("further from the training images than")).to_be_visible()
    expect(page.get_by_alt_text("Class activation map")).to_be_visible()
    expect(page.get_by_alt_text("Integrated Gradients overlay")).to_be_visible(timeout=ANSWER_SECONDS * 1000)
    expect(page.get_by_alt_text("SHAP (expected gradients) overlay")).to_be_visible()
    expect(page.get_by_text("Faithfulness: ")).to_have_count(2)
    dashboard.check("predict")

    right = next(label for label in CLASSES if label != again.label)
    choose(page, "Right label", right)
    page.get_by_label("Your name").fill("Ada Lovelace")
    comment = "<b>not</b> what it is ![x](http://127.0.0.1:1/x.png)"
    page.get_by_label("Comment (optional)").fill(comment)
    page.get_by_role("button", name="Save correction").click()
    stored_note = page.get_by_test_id("stAlertContentSuccess")
    expect(stored_note).to_contain_text("Correction stored")
    dashboard.check("predict-corrected")

    with InferenceClient(stack.addresses["inference"]) as inference:
        stored = inference.corrections()[0]
    assert (stored.label, stored.author, stored.comment, stored.status) == (right, "Ada Lovelace", comment, "pending")
    expect(stored_note).to_contain_text(stored.id)
    records = open_records(f"sqlite:///{stack.home / 'records.sqlite'}")
    kept = records.get("corrections", stored.id)
    records.close()
    assert kept is not None
    assert kept.document["label"] == right

    page.get_by_role("link", name="Corrections").click()
    expect(page.get_by_role("heading", name="Corrections", exact=True)).to_be_visible()
    row = page.locator("tr", has_text=stored.id)
    # What was typed stands there as text.
    expect(row.get_by_text(comment)).to_have_count(1)
    expect(row.get_by_text("pending")).to_have_count(1)
    dashboard.check("corrections")


@pytest.mark.parametrize("tab", TABS)
def test_every_tab_of_a_run_has_content(stack: RunningStack, dashboard: Dashboard, tab: str) -> None:
    page = dashboard.page
    # The demo's own version: other tests may have trained a newer one, which nobody evaluated.
    dashboard.open(f"runs?version={stack.document['model']['version']}", "Runs")
    page.get_by_role("tab", name=tab).click()
    panel = page.get_by_role("tabpanel", name=tab)
    dashboard.settle()
    charts, images = panel.get_by_test_id("stVegaLiteChart"), panel.locator("img")
    match tab:
        case "Metrics":
            expect(cell(panel, "val_accuracy")).to_have_count(1)
            expect(cell(panel, "architecture")).to_have_count(1)
            expect(charts.nth(2)).to_be_visible()
        case "Artifacts":
            expect(cell(panel, "model.onnx")).to_have_count(1)
            expect(panel.get_by_text('"confusion"')).to_be_visible()
        case "Evaluation":
            expect(cell(panel, "Accuracy")).to_have_count(1)
            expect(cell(panel, CLASSES[0]).first).to_be_attached()
            expect(charts).to_have_count(1)
        case "Explanations":
            expect(images.nth(2)).to_be_visible()
            expect(panel.get_by_text("Faithfulness: ").first).to_be_visible()
        case "Visualizations":
            expect(charts).to_have_count(3)
            expect(cell(panel, "all")).to_have_count(1)
    dashboard.check(f"runs-{tab.lower()}")


def test_models_offers_approval_and_says_who_approved(stack: RunningStack, dashboard: Dashboard) -> None:
    page = dashboard.page
    dashboard.open("models", "Models")
    with EvaluatorClient(stack.addresses["evaluator"]) as evaluator:
        newest = evaluator.timeline(stack.model)[0].approval
    expect(page.get_by_text(f"{stack.model} version {newest.version}").first).to_be_visible()
    for title in ("Versions", "Approve", "Roll back", "Who changed what, when and why"):
        expect(page.get_by_role("heading", name=title, exact=True)).to_be_visible()
    expect(cell(page.locator("body"), newest.key_id).first).to_be_attached()
    dashboard.check("models")
