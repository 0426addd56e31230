"""Pages that talk to stand-ins of the services and to a finished run."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import streamlit as st
from medloop.data.manifest import Manifest
from medloop.http import Readiness, create_app
from medloop.settings import ServerSettings
from medloop.storage.objects import ObjectStore
from medloop.testing import live_server
from medloop_dashboard.screens import elements
from medloop_dashboard.settings import DashboardSettings
from streamlit.runtime.context import ContextProxy
from streamlit.testing.v1 import AppTest

from .fakes import Fakes, routers
from .studio import Studio, build, make_manifest


@pytest.fixture(scope="session")
def fake_services() -> Iterator[Fakes]:
    """All three services at one address, over real HTTP."""
    fakes = Fakes()
    readiness = Readiness()
    readiness.passed()
    app = create_app("fakes", ServerSettings(), routers=routers(fakes), readiness=readiness)
    with live_server(app) as url:
        fakes.url = url
        yield fakes


@pytest.fixture
def fakes(fake_services: Fakes, home: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """The stand-ins, fresh, with the dashboard's environment pointing at them."""
    for member in fields(Fakes):
        if member.name != "url":
            setattr(fake_services, member.name, getattr(Fakes(), member.name))
    for service in ("INFERENCE", "EVALUATOR", "EXPLAINER"):
        monkeypatch.setenv(f"MEDLOOP_{service}_URL", fake_services.url)
    return fake_services


@pytest.fixture
def page(fakes: Fakes) -> Iterator[Callable[[str], AppTest]]:
    """Makes a page of the dashboard by its module's name; every test has clients and caches of its own."""

    def make(name: str) -> AppTest:
        st.cache_data.clear()
        elements.connections.clear()
        script = f"from medloop_dashboard.screens import {name}\n{name}.show()"
        return AppTest.from_string(script, default_timeout=60)

    yield make
    st.cache_data.clear()
    elements.connections.clear()


@pytest.fixture
def signed_in(home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a person whom a proxy signed in; what a browser sends cannot be given to pages in tests."""
    monkeypatch.setenv("MEDLOOP_AUTH", "proxy")
    monkeypatch.setattr(ContextProxy, "headers", {DashboardSettings().user_header: "Ann Example"})
    return "Ann Example"


@pytest.fixture
def manifest(objects: ObjectStore) -> Manifest:
    return make_manifest(objects)


@pytest.fixture(scope="session")
def finished(tracking_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    folder = tmp_path_factory.mktemp("studio")
    shutil.copy(tracking_template, folder / "mlflow.sqlite")
    return build(folder, folder / "mlflow.sqlite")


@pytest.fixture
def studio(finished: Studio, home: Path, monkeypatch: pytest.MonkeyPatch) -> Studio:
    """The studio, named in the environment."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", finished.tracking_uri)
    monkeypatch.setenv("MEDLOOP_OBJECTS_URL", finished.objects.as_uri())
    return finished


@pytest.fixture
def texts() -> Callable[[AppTest], str]:
    """Everything that a page says in words, tables included."""

    def read(app: AppTest) -> str:
        kinds = ("title", "subheader", "markdown", "caption", "text", "info", "warning", "error", "success")
        shown: list[Any] = [element for kind in kinds for element in app.get(kind)]
        said = [str(element.value) for element in shown]
        said += [element.proto.title for element in shown if hasattr(element.proto, "title")]
        return "\n".join(said + [table.value.to_csv() for table in app.dataframe])

    return read
