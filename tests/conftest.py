"""Fixtures that every part's tests share: a home of their own, stores in it, and an MLflow without a server."""

import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from medloop import cli
from medloop.cli.output import run
from medloop.registry import Registry
from medloop.storage.objects import ObjectStore, open_objects
from medloop.storage.records import RecordStore, open_records

REPOSITORY = Path(__file__).parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"

# How long an example takes says how busy the machine is.
settings.register_profile(
    "patient",
    settings.get_profile(settings.get_current_profile_name()),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("patient")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty `MEDLOOP_HOME`, which also every setting of this test falls back to."""
    folder = tmp_path / ".medloop"
    folder.mkdir()
    for name in ("MEDLOOP_OBJECTS_URL", "MEDLOOP_RECORDS_URL", "MEDLOOP_MODEL", "MEDLOOP_AUTH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MEDLOOP_HOME", str(folder))
    return folder


@pytest.fixture
def objects(home: Path) -> ObjectStore:
    return open_objects((home / "objects").as_uri())


@pytest.fixture
def hanging_s3(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Objects are in an S3 that takes connections and says nothing, and whoever has a person waiting gives it 0.2 s."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "MEDLOOP_OBJECTS_URL": "s3://bucket",
            "MEDLOOP_OBJECTS_SECONDS": "0.2",
        }.items():
            monkeypatch.setenv(name, value)
        yield


@pytest.fixture
def records(home: Path) -> Iterator[RecordStore]:
    store = open_records(f"sqlite:///{home / 'records.sqlite'}")
    yield store
    store.close()


@pytest.fixture
def medloop(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process: its arguments → exit status, standard output, standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["medloop", *arguments])
        status = run(cli.app)
        output = capsys.readouterr()
        return status, output.out, output.err

    return call


@pytest.fixture(scope="session")
def tracking_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty MLflow database: making one takes seconds, copying it nothing."""
    path = tmp_path_factory.mktemp("mlflow") / "template.sqlite"
    Registry(f"sqlite:///{path}").ping()
    return path


@pytest.fixture
def tracking_uri(tracking_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An MLflow of this test's own: full, without a server; artifacts lie under the test's folder."""
    database = tmp_path / "mlflow.sqlite"
    shutil.copy(tracking_template, database)
    monkeypatch.chdir(tmp_path)  # MLflow puts artifacts of a server-less store under the working directory
    uri = f"sqlite:///{database}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


@pytest.fixture
def registry(tracking_uri: str) -> Registry:
    return Registry(tracking_uri)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real medical images; a test that needs it is skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the real images in ../shared/data")
    return SHARED_DATA
