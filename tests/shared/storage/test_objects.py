"""Which store an address opens."""

from pathlib import Path

import pytest
from medloop.errors import InvalidRequest, StorageUnavailable
from medloop.storage.folder import FolderObjects
from medloop.storage.objects import open_objects
from medloop.storage.s3 import S3Objects


def test_a_file_address_opens_a_folder(tmp_path: Path) -> None:
    root = tmp_path / "with space"
    objects = open_objects(root.as_uri())
    assert isinstance(objects, FolderObjects)
    objects.put("key", b"x")
    assert (root / "key").read_bytes() == b"x"
    assert objects.url == root.as_uri()


@pytest.mark.parametrize(
    ("address", "url"),
    [("s3://bucket", "s3://bucket"), ("s3://bucket/", "s3://bucket"), ("s3://bucket/a/b/", "s3://bucket/a/b")],
)
def test_an_s3_address_opens_s3(address: str, url: str) -> None:
    objects = open_objects(address)
    assert isinstance(objects, S3Objects)
    assert objects.url == url


@pytest.mark.parametrize(
    "address",
    ["", "/a/path", "file://host/path", "file:///", "http://host/", "s3://", "s3://B", "s3://bucket/../x"],
)
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(InvalidRequest):
        open_objects(address)


def test_credentials_in_the_address_are_not_repeated() -> None:
    with pytest.raises(InvalidRequest) as caught:
        open_objects("s3://key:hunter2@bucket/prefix")
    assert "hunter2" not in str(caught.value)


def test_an_impossible_endpoint_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "not an address")
    with pytest.raises(StorageUnavailable, match="AWS_"):
        open_objects("s3://bucket")
