"""Which implementations the contract suites run on, and a line at the end of the run that says so."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3
import pytest
from medloop.storage.folder import FolderObjects
from medloop.storage.objects import ObjectStore, open_objects
from medloop.storage.s3 import S3Objects
from moto.server import ThreadedMotoServer

S3_URL = "MEDLOOP_TEST_S3_URL"
OBJECTS = ["folder", "moto", *(["s3"] if os.environ.get(S3_URL) else [])]
_NAMES = {
    "folder": "folder",
    "moto": "S3 protocol on moto",
    "s3": "S3 server",
}


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    """The address of an S3 server of moto's on a free loopback port."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def aws(moto_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """AWS's own variables, naming moto's server."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


def _moto_objects() -> ObjectStore:
    bucket = f"test-{uuid4().hex}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return open_objects(f"s3://{bucket}/some/prefix")


@pytest.fixture(params=OBJECTS)
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    """An empty object store."""
    if request.param == "folder":
        yield FolderObjects(tmp_path / "objects")
    elif request.param == "moto":
        request.getfixturevalue("aws")
        yield _moto_objects()
    else:
        store = open_objects(f"{os.environ[S3_URL].rstrip('/')}/{uuid4().hex}")
        assert isinstance(store, S3Objects)
        yield store
        for key in list(store.list()):
            store.delete(key)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say on which implementations the contract was kept."""
    passed = [report.nodeid for report in terminalreporter.stats.get("passed", [])]
    if objects := _ran(passed, "objects", OBJECTS):
        missing = "" if "s3" in objects else f" (no S3 server: set {S3_URL})"
        terminalreporter.write_line(f"objects contract: {', '.join(_NAMES[name] for name in objects)}{missing}")


def _ran(passed: list[str], suite: str, implementations: list[str]) -> list[str]:
    """The implementations on which at least one test of the suite passed."""
    nodes = [node for node in passed if f"contract/test_{suite}.py::" in node]
    return [name for name in implementations if any(f"[{name}" in node for node in nodes)]
