"""Objects: bytes under a key, in a folder of this machine or in S3.

Both implementations keep the same promises, and one contract suite (`tests/contract/test_objects.py`) runs on both:
a reader sees an object whole or not at all, and what `put` has acknowledged survives a power failure.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit
from urllib.request import url2pathname

from medloop.errors import InvalidRequest, ObjectTooLarge

_WRITABLE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+-]*(?:/[A-Za-z0-9_][A-Za-z0-9._=+-]*)*")
_SEGMENT_BYTES = 255  # the longest file name of common file systems
_KEY_BYTES = 900  # S3 allows 1,024 (its user guide, "Object key names"); the rest is for the store's prefix


class ObjectStore(Protocol):
    """Bytes by key. Keys are `/`-separated; no key may be the folder of another one.

    Every verb may raise `StorageUnavailable`; those that write also `StorageFull`, and `InvalidRequest` for a key
    outside letters, digits and `._=+-` or with a segment that starts with a sign other than `_`. Reading accepts
    whatever names a foreign bucket may hold.
    """

    @property
    def url(self) -> str:
        """Where the objects lie, without credentials: fit for messages."""
        ...

    def put(self, key: str, data: bytes, *, durable: bool = True) -> None:
        """Store `data` under `key`, replacing what was there.

        With `durable=False` a folder does not wait for the disk: right for thousands of images followed by one
        durable write of what names them, since a durable write also makes lasting all that this store wrote before.
        S3 is always durable.
        """
        ...

    def put_if_absent(self, key: str, data: bytes, *, durable: bool = True) -> bool:
        """Store `data` unless `key` exists; of many callers exactly one gets True. `durable` as in `put`; on False it
        holds for what was there already."""
        ...

    def get(self, key: str, *, at_most: int | None = None) -> bytes:
        """The object's bytes; raises `NotFound`, and `ObjectTooLarge` when there are more than `at_most`, before they
        take memory."""
        ...

    def exists(self, key: str) -> bool: ...

    def list(self, prefix: str = "") -> Iterator[str]:
        """Keys that start with `prefix`, sorted; read lazily, so storage errors may come while iterating."""
        ...

    def delete(self, key: str) -> None:
        """Remove `key`; one that is not there is no error."""
        ...

    def ping(self) -> None:
        """Return if the store answers; raises `StorageUnavailable` or `StorageFull` otherwise."""
        ...


def open_objects(url: str, *, within: float | None = None) -> ObjectStore:
    """The store at `file:///…` or `s3://bucket/prefix`; raises `InvalidRequest` for any other address.

    `within` is for whoever has a person waiting: each verb answers, or raises `StorageUnavailable`, within so many
    seconds, whatever hangs (`medloop.storage.prompt`). Without it, what is slow is waited for, in S3 for minutes.

    Opening touches neither disk nor network, so that a service starts while its storage is down. S3 takes endpoint,
    region and credentials from AWS's own variables (`AWS_ENDPOINT_URL`, `AWS_PROFILE`, …).
    """
    # Imported here: the implementations import this module, and boto3 costs half a second.
    if within is not None:
        from medloop.storage.prompt import PromptObjects

        return PromptObjects(_open(url, within), within)
    return _open(url)


def _open(url: str, within: float | None = None) -> ObjectStore:
    if url.startswith("s3://"):
        from medloop.storage.s3 import S3Objects

        return S3Objects.open(url, within)
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.strip("/"):
        from medloop.storage.folder import FolderObjects

        return FolderObjects(Path(url2pathname(parts.path)))
    raise InvalidRequest(
        f"No objects can lie at this address ({parts.scheme or 'no'} scheme); name file:///… or s3://…"
    )


def check_writable(key: str) -> None:
    """Raise `InvalidRequest` unless objects may be stored under `key`."""
    check_readable(key)
    if not _WRITABLE.fullmatch(key):
        raise InvalidRequest(f"The object key {key!r} has characters outside letters, digits and ._=+-; rename it.")


def check_size(key: str, size: int, at_most: int | None) -> None:
    """Raise `ObjectTooLarge` for more than `at_most` bytes."""
    if at_most is not None and size > at_most:
        raise ObjectTooLarge(f"The object {key} has {size:,} bytes, more than the {at_most:,} that are taken.")


def check_readable(key: str) -> None:
    """Raise `InvalidRequest` for a key that could lead out of the store or that no store can hold."""
    segments = key.split("/")
    if any(segment in ("", ".", "..") for segment in segments) or any(ord(char) < 32 for char in key):
        raise InvalidRequest(f"The object key {key!r} must be a relative path without empty, . or .. parts.")
    sizes = [len(segment.encode(errors="surrogatepass")) for segment in segments]
    if max(sizes) > _SEGMENT_BYTES or sum(sizes) + len(sizes) > _KEY_BYTES:
        raise InvalidRequest(f"The object key {key[:80]!r}… is too long; shorten it.")
