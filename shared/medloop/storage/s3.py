"""Objects in Amazon S3 or a server that speaks its protocol, through boto3."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from medloop.errors import InvalidRequest, NotFound, StorageFull, StorageUnavailable
from medloop.storage.objects import check_readable, check_size, check_writable

if TYPE_CHECKING:
    from botocore.exceptions import ClientError

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")  # "Bucket naming rules" of the S3 user guide
_ATTEMPTS = 4
_MISSING = {"NoSuchKey", "NotFound", "404"}
_TAKEN = {"PreconditionFailed", "412"}
_RACING = {"ConditionalRequestConflict", "409"}  # another conditional write of the same key is under way
_FULL = {"XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "QuotaExceeded", "507"}
REFUSED = {"AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"}


class S3Objects:
    """`ObjectStore` under `prefix` in `bucket`; `client` is boto3's S3 client, which threads may share (its methods
    are made at run time, so it has no type)."""

    def __init__(self, client: Any, bucket: str, prefix: str = "") -> None:
        self._client = client
        self._bucket = bucket
        self._prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""

    @classmethod
    def open(cls, url: str, within: float | None = None) -> "S3Objects":
        """The store at `s3://bucket/prefix`; nothing is sent yet. A request that nobody waits for after `within`
        seconds has two attempts in that time; one that nobody waits for at all, more and longer ones."""
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        if not _BUCKET.fullmatch(bucket):  # the name is not repeated: it may hold credentials
            raise InvalidRequest("The address of objects must be s3://bucket/prefix, without credentials in it.")
        if prefix.strip("/"):
            check_readable(prefix.strip("/"))
        # Servers other than Amazon's are reached by one host name, which cannot carry the bucket's.
        own_server = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        config = Config(
            connect_timeout=3 if within is None else within / 2,
            read_timeout=30 if within is None else within / 2,
            retries={"mode": "standard", "total_max_attempts": _ATTEMPTS if within is None else 2},
            max_pool_connections=32,
            s3={"addressing_style": "path"} if own_server else None,
        )
        try:
            client = boto3.client("s3", config=config)
        except (BotoCoreError, ValueError) as exc:  # a profile or endpoint that cannot be right
            reason = type(exc).__name__
            raise StorageUnavailable(f"boto3 cannot be set up for S3 ({reason}); check the AWS_* variables.") from exc
        return cls(client, bucket, prefix)

    def __repr__(self) -> str:
        return f"S3Objects({self.url!r})"

    @property
    def url(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def put(self, key: str, data: bytes, *, durable: bool = True) -> None:
        check_writable(key)
        with _translated(self.url):
            self._client.put_object(Bucket=self._bucket, Key=self._prefix + key, Body=data)

    def put_if_absent(self, key: str, data: bytes, *, durable: bool = True) -> bool:
        check_writable(key)
        with _translated(self.url):
            return self._put_if_absent(self._prefix + key, data)

    def _put_if_absent(self, name: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        writer = uuid4().hex
        attempts = 0
        while True:
            try:
                self._client.put_object(
                    Bucket=self._bucket, Key=name, Body=data, IfNoneMatch="*", Metadata={"writer": writer}
                )
            except ClientError as exc:
                if _code(exc) in _TAKEN:
                    return _resent(exc) and self._writer(name) == writer
                attempts += 1
                if _code(exc) not in _RACING or attempts == _ATTEMPTS:
                    raise
            else:
                return True
            time.sleep(0.05 * 2**attempts)

    def _writer(self, name: str) -> str | None:
        head = self._client.head_object(Bucket=self._bucket, Key=name)
        writer: str | None = head["Metadata"].get("writer")
        return writer

    def get(self, key: str, *, at_most: int | None = None) -> bytes:
        check_readable(key)
        from botocore.exceptions import ClientError

        with _translated(self.url):
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key)
                with answer["Body"] as body:
                    check_size(key, answer["ContentLength"], at_most)
                    data: bytes = body.read()
            except ClientError as exc:
                if _code(exc) in _MISSING:
                    raise NotFound(f"There is no object {key} in {self.url}.") from exc
                raise
            return data

    def exists(self, key: str) -> bool:
        check_readable(key)
        from botocore.exceptions import ClientError

        with _translated(self.url):
            try:
                self._client.head_object(Bucket=self._bucket, Key=self._prefix + key)
            except ClientError as exc:
                if _code(exc) in _MISSING:
                    return False
                raise
            return True

    def list(self, prefix: str = "") -> Iterator[str]:
        check_readable(prefix + "x")  # a prefix is right if a key can start with it
        return self._list(prefix)

    def _list(self, prefix: str) -> Iterator[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix + prefix
        )
        with _translated(self.url):
            for page in pages:
                for entry in page.get("Contents", ()):
                    key: str = entry["Key"].removeprefix(self._prefix)
                    if key and not key.endswith("/"):  # consoles mark a folder by an empty object
                        yield key

    def delete(self, key: str) -> None:
        check_readable(key)
        with _translated(self.url):
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)

    def make_bucket(self) -> bool:
        """Make the bucket, for a development stack's own server; False when it was there. Raises
        `StorageUnavailable`."""
        from botocore.exceptions import ClientError

        with _translated(self.url):
            try:
                self._client.head_bucket(Bucket=self._bucket)
            except ClientError as exc:
                if _code(exc) not in _MISSING:
                    raise
                self._client.create_bucket(Bucket=self._bucket)
                return True
            return False

    def ping(self) -> None:
        # Listing one key, rather than asking for the bucket, works for a role that may see this prefix only.
        with _translated(self.url):
            self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)


def _code(error: "ClientError") -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _resent(error: "ClientError") -> bool:
    """Whether boto3 sent the request again after losing an answer, so that the object may be our own."""
    return bool(error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0))


@contextmanager
def _translated(url: str) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    try:
        yield
    except ClientError as exc:
        code = _code(exc)
        if code in _FULL:
            raise StorageFull(f"The object storage at {url} is full; free some space and try again.") from exc
        if code in REFUSED:
            raise StorageUnavailable(
                f"Access to {url} was denied ({code}); check the AWS_* variables and the policy."
            ) from exc
        if code == "NoSuchBucket":
            raise StorageUnavailable(f"The bucket of {url} does not exist; create it.") from exc
        raise StorageUnavailable(f"The object storage at {url} failed ({code}); try again.") from exc
    except (BotoCoreError, ResponseParserError) as exc:
        reason = type(exc).__name__
        raise StorageUnavailable(
            f"The object storage at {url} cannot be reached ({reason}); check it and the AWS_* variables."
        ) from exc
