"""Which implementations the contract suites run on, and a line at the end of the run that says so."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import boto3
import mongomock
import pytest
from medloop.storage.folder import FolderObjects
from medloop.storage.mongo import MongoRecords
from medloop.storage.objects import ObjectStore, open_objects
from medloop.storage.prompt import PromptObjects
from medloop.storage.records import RecordStore, open_records
from medloop.storage.s3 import S3Objects
from moto.server import ThreadedMotoServer
from pymongo import MongoClient

S3_URL = "MEDLOOP_TEST_S3_URL"
MONGODB_URL = "MEDLOOP_TEST_MONGODB_URL"  # any database in it is left alone: each test makes its own and drops it
OBJECTS = ["folder", "prompt", "moto", *(["s3"] if os.environ.get(S3_URL) else [])]
RECORDS = ["sqlite", "mongomock", *(["mongodb"] if os.environ.get(MONGODB_URL) else [])]
_NAMES = {
    "folder": "folder",
    "prompt": "folder with a time limit",
    "moto": "S3 protocol on moto",
    "s3": "S3 server",
    "sqlite": "SQLite",
    "mongomock": "mongomock",
    "mongodb": "MongoDB server",
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
    elif request.param == "prompt":
        yield PromptObjects(FolderObjects(tmp_path / "objects"), 600)
    elif request.param == "moto":
        request.getfixturevalue("aws")
        yield _moto_objects()
    else:
        store = open_objects(f"{os.environ[S3_URL].rstrip('/')}/{uuid4().hex}")
        assert isinstance(store, S3Objects)
        yield store
        for key in list(store.list()):
            store.delete(key)


@pytest.fixture(params=RECORDS)
def records(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RecordStore]:
    """An empty record store."""
    if request.param == "sqlite":
        store: RecordStore = open_records(f"sqlite:///{tmp_path / 'records.sqlite'}")
    elif request.param == "mongomock":
        store = MongoRecords(mongomock.MongoClient(), "medloop")
    else:
        store = open_records(_in_database(os.environ[MONGODB_URL], f"medloop_test_{uuid4().hex}"))
    yield store
    store.close()
    if request.param == "mongodb":
        with MongoClient[Any](os.environ[MONGODB_URL]) as client:
            client.drop_database(store.url.rpartition("/")[2])


def _in_database(url: str, database: str) -> str:
    """The same server and options, another database (whoever logs in does so against `authSource` or `admin`)."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"/{database}"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say on which implementations the contracts were kept."""
    passed = [report.nodeid for report in terminalreporter.stats.get("passed", [])]
    for suite, implementations, server, variable in (
        ("objects", OBJECTS, "S3", S3_URL),
        ("records", RECORDS, "MongoDB", MONGODB_URL),
    ):
        if ran := _ran(passed, suite, implementations):
            missing = "" if implementations[-1] == server.lower() else f" (no {server} server: set {variable})"
            terminalreporter.write_line(f"{suite} contract: {', '.join(_NAMES[name] for name in ran)}{missing}")


def _ran(passed: list[str], suite: str, implementations: list[str]) -> list[str]:
    """The implementations on which at least one test of the suite passed."""
    nodes = [node for node in passed if f"contract/test_{suite}.py::" in node]
    return [name for name in implementations if any(f"[{name}" in node for node in nodes)]
