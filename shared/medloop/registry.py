"""The model registry: MLflow's, with aliases, through its light client; its errors are translated here.

`champion` is what production answers with, `challenger` what waits for approval, `previous` where a rollback goes.
"""

import errno
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from medloop.bundle import Bundle, read_bundle
from medloop.errors import MedLoopError, NotFound, TrackingUnavailable, UntrustedModel
from medloop.settings import mask_url
from medloop.storage.disk import disk_errors
from medloop.storage.s3 import REFUSED

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.exceptions import MlflowException

logger = logging.getLogger(__name__)

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"

TAG_DIGEST = "medloop.bundle_digest"
TAG_DATASET = "medloop.dataset_id"
TAG_APPROVAL = "medloop.approval"
"""`Approval` as JSON. Of a version: its own newest one. Of the registered model: the one in force, which the champion
alias must agree with, so that an alias moved by hand, even to a version that was approved once, is noticed."""
TAG_OUTCOME = "medloop.outcome"
"""Of a run: why it ended without registering a version, if it did."""

BUNDLE_PATH = "bundle"
"""Where the bundle lies among a run's artifacts."""


LOOK_SECONDS = 5.0
"""How long `Registry.state` waits for MLflow: it is asked every few seconds, so one that hangs must be noticed soon.
All else may take the half minute that MLflow's own variables allow, since bundles are large."""
_LOOK = "/api/2.0/mlflow/registered-models/get"
_DIGEST = re.compile(r"[0-9a-f]{64}")  # SHA-256
_BUCKET = re.compile(r"(?:s3://| to )([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/")  # as MLflow and boto3 name it in messages
_REFUSED = {"PERMISSION_DENIED", "UNAUTHENTICATED"}
_INCOMING = ".incoming-"
_ABANDONED_S = 3600.0
"""A download this old belongs to a process that was killed."""
UNUSED_S = 7 * 24 * 3600.0
NEWEST_BUNDLES = 5
"""How many bundles stay however long nobody used them."""


@dataclass(frozen=True, slots=True)
class Version:
    """A registered model version. `version` counts up from "1"; `created_at` is seconds since 1970."""

    model: str
    version: str
    run_id: str
    tags: dict[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    created_at: float = 0.0


@dataclass(frozen=True, slots=True)
class State:
    """What one registered model's aliases point at now, and its tags: read in one request."""

    aliases: dict[str, str]
    tags: dict[str, str]


@contextmanager
def translated(tracking_uri: str, subject: str = "It") -> Iterator[None]:
    """Turn the errors of MLflow, its transport and the store of its artifacts into ours: NotFound, or
    TrackingUnavailable."""
    import requests
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError
    from mlflow.exceptions import MlflowException, RestException

    try:
        yield
    except RestException as exc:
        # An alias that points nowhere is an invalid parameter to MLflow, in its server as in its SQL store.
        if exc.error_code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
            raise NotFound(f"{subject} is not in MLflow at {mask_url(tracking_uri)}.") from exc
        raise TrackingUnavailable(f"MLflow at {mask_url(tracking_uri)} refused: {exc.message}") from exc
    except MlflowException as exc:
        if exc.error_code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
            raise NotFound(f"{subject} is not in MLflow at {mask_url(tracking_uri)}.") from exc
        if exc.error_code in _REFUSED or _came_from(exc, BotoCoreError, ClientError):
            raise _artifacts_fault(exc) from exc
        raise _unreachable(tracking_uri) from exc
    except (Boto3Error, BotoCoreError, ClientError) as exc:
        # Services reach artifacts in S3 themselves, and MLflow lets most of what boto3 raises pass.
        raise _artifacts_fault(exc) from exc
    except (requests.RequestException, ConnectionError) as exc:
        raise _unreachable(tracking_uri) from exc


def _artifacts_fault(error: Exception) -> MedLoopError:
    from botocore.exceptions import ClientError

    told = _came_from(error, ClientError)
    code = str(told.response.get("Error", {}).get("Code", "")) if isinstance(told, ClientError) else ""
    bucket = _BUCKET.search(str(error))
    where = f"MLflow's artifacts in {f'the bucket {bucket[1]}' if bucket else 'S3'}"
    if code in REFUSED or getattr(error, "error_code", "") in _REFUSED:
        return TrackingUnavailable(
            f"Access to {where} was denied{f' ({code})' if code else ''}; check the AWS_* variables and the policy."
        )
    reason = code or type(_came_from(error, Exception) or error).__name__
    return TrackingUnavailable(f"{where} cannot be reached ({reason}); check the store and the AWS_* variables.")


def _came_from(error: BaseException, *kinds: type[Exception]) -> BaseException | None:
    """The innermost error of these kinds that `error` was raised from, or is."""
    found: BaseException | None = None
    at: BaseException | None = error
    while at is not None:
        found = at if isinstance(at, kinds) else found
        at = at.__cause__ or at.__context__
    return found


def _unreachable(tracking_uri: str) -> MedLoopError:
    return TrackingUnavailable(
        f"MLflow does not answer at {mask_url(tracking_uri)}. Start it (medloop up) or set MLFLOW_TRACKING_URI."
    )


class Registry:
    """The registry behind one tracking address."""

    def __init__(self, tracking_uri: str) -> None:
        # MLflow's own defaults retry for minutes; a person or a probe is waiting for the answer.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        # Its bars would stand between the JSON lines of a log, and across our own on a terminal.
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        self.tracking_uri = tracking_uri
        self._client: MlflowClient | None = None

    @property
    def client(self) -> "MlflowClient":
        """MLflow's client. Wrap calls in `translated`."""
        if self._client is None:
            from mlflow import MlflowClient  # over a second: only who needs it pays

            self._client = MlflowClient(tracking_uri=self.tracking_uri, registry_uri=self.tracking_uri)
        return self._client

    def register(self, model: str, run_id: str, tags: dict[str, str]) -> Version:
        """Register the bundle that lies in `run_id`'s artifacts as the next version of `model`."""
        from mlflow.exceptions import MlflowException

        with translated(self.tracking_uri, f"Run {run_id}"):
            try:
                self.client.create_registered_model(model)
            except MlflowException as exc:
                if exc.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            source = f"{self.client.get_run(run_id).info.artifact_uri}/{BUNDLE_PATH}"
            return _version(self.client.create_model_version(model, source, run_id=run_id, tags=tags))

    def version(self, model: str, version: str) -> Version:
        with translated(self.tracking_uri, f"Model {model} version {version}"):
            return _version(self.client.get_model_version(model, version))

    def at_alias(self, model: str, alias: str) -> Version | None:
        """The version that `alias` points at; None when the model or the alias does not exist."""
        try:
            with translated(self.tracking_uri, f"{model}@{alias}"):
                return _version(self.client.get_model_version_by_alias(model, alias))
        except NotFound:
            return None

    def state(self, model: str) -> State | None:
        """Aliases and tags of `model`; None when it is not registered. Raises TrackingUnavailable, after 5 s at most
        where a server accepts the request and says nothing."""
        try:
            with translated(self.tracking_uri, f"Model {model}"):
                if self.tracking_uri.startswith(("http://", "https://")):
                    return self._look(model)
                found = self.client.get_registered_model(model)
        except NotFound:
            return None
        return State({alias: str(v) for alias, v in found.aliases.items()}, dict(found.tags))

    def _look(self, model: str) -> State:
        """What `state` returns, by MLflow's REST API: its client has no time limit for one request, and its variables
        are the whole process's. Credentials, certificates and errors are the client's."""
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request, verify_rest_response

        credentials = get_default_host_creds(self.tracking_uri)  # type: ignore[no-untyped-call]
        answer = http_request(  # type: ignore[no-untyped-call]
            credentials, _LOOK, "GET", max_retries=0, timeout=LOOK_SECONDS, params={"name": model}
        )
        found = json.loads(verify_rest_response(answer, _LOOK).text)["registered_model"]
        return State(
            {entry["alias"]: str(entry["version"]) for entry in found.get("aliases", [])},
            {entry["key"]: entry.get("value", "") for entry in found.get("tags", [])},
        )

    def versions(self, model: str) -> list[Version]:
        """All versions of `model`, newest first, with their aliases."""
        with translated(self.tracking_uri, f"Model {model}"):
            pointing: dict[str, list[str]] = {}
            for alias, version in self.client.get_registered_model(model).aliases.items():
                pointing.setdefault(str(version), []).append(alias)
            found = [_version(v) for v in self.client.search_model_versions(f"name = '{model}'", max_results=1000)]
        named = [
            Version(v.model, v.version, v.run_id, v.tags, tuple(sorted(pointing.get(v.version, []))), v.created_at)
            for v in found
        ]
        return sorted(named, key=lambda v: int(v.version), reverse=True)

    def models(self) -> list[str]:
        with translated(self.tracking_uri):
            return sorted(model.name for model in self.client.search_registered_models(max_results=1000))

    def set_alias(self, model: str, alias: str, version: str) -> None:
        with translated(self.tracking_uri, f"Model {model} version {version}"):
            self.client.set_registered_model_alias(model, alias, version)

    def delete_alias(self, model: str, alias: str) -> None:
        with translated(self.tracking_uri, f"{model}@{alias}"):
            self.client.delete_registered_model_alias(model, alias)

    def set_tag(self, model: str, version: str, key: str, value: str) -> None:
        with translated(self.tracking_uri, f"Model {model} version {version}"):
            self.client.set_model_version_tag(model, version, key, value)

    def set_model_tag(self, model: str, key: str, value: str) -> None:
        with translated(self.tracking_uri, f"Model {model}"):
            self.client.set_registered_model_tag(model, key, value)

    def download_bundle(self, version: Version, destination: Path) -> Path:
        """Fetch the version's bundle into `destination` (made if need be); returns the bundle's folder."""
        import mlflow.artifacts
        from mlflow.exceptions import MlflowException

        destination.mkdir(parents=True, exist_ok=True)
        with translated(self.tracking_uri, f"The bundle of {version.model} version {version.version}"):
            source = self.client.get_model_version_download_uri(version.model, version.version)
            try:
                folder = mlflow.artifacts.download_artifacts(
                    artifact_uri=source, dst_path=str(destination), tracking_uri=self.tracking_uri
                )
            except MlflowException as exc:
                _raise_if_full(exc)
                raise
        return Path(folder)

    def ping(self) -> None:
        """Raise TrackingUnavailable unless the registry answers."""
        with translated(self.tracking_uri):
            self.client.search_registered_models(max_results=1)


def _raise_if_full(error: "MlflowException") -> None:
    # Files are fetched in threads of MLflow's own, and it hands on what they met as text.
    for code in (errno.ENOSPC, errno.EDQUOT):
        if os.strerror(code) in error.message:
            raise OSError(code, os.strerror(code)) from error


class BundleCache:
    """Bundles under `folder`, each in a folder named by its digest; several processes may share it.

    A bundle's folder has the time of its last use, by whichever process, so that `evict` can tell which nobody needs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, digest: str) -> Bundle | None:
        """The bundle if it is here and still what its digest says; one that is damaged is thrown away."""
        folder = self._folder / _checked(digest)
        with disk_errors(self._folder):
            if not folder.is_dir():
                return None
            try:
                self.touch([digest])
                bundle = read_bundle(folder)
                if bundle.digest == digest:
                    return bundle
                reason = "it is another bundle"
            except UntrustedModel as exc:
                reason = exc.detail
            logger.warning("the cached bundle %s is damaged (%s); it will be downloaded again", digest[:12], reason)
            with self._scratch() as scratch:
                folder.rename(scratch / digest)
        return None

    def fetch(self, registry: Registry, version: Version, digest: str) -> Bundle:
        """Download the bundle of a version, verify it and keep it.

        Raises UntrustedModel for anything but the bundle with `digest`, NotFound, TrackingUnavailable, and
        StorageFull or StorageUnavailable for this machine's disk.
        """
        _checked(digest)
        with disk_errors(self._folder), self._scratch() as scratch:
            bundle = read_bundle(registry.download_bundle(version, scratch / "download"))
            if bundle.digest != digest:
                raise UntrustedModel(
                    f"The bundle that MLflow has for {version.model} version {version.version} is not the expected "
                    f"one: its digest is {bundle.digest[:12]}…, not {digest[:12]}…. Train and register it again."
                )
            target = self._folder / digest
            try:
                bundle.folder.rename(target)
            except OSError as exc:
                # One that is here and whole stays: another process may be reading it.
                if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                if (kept := self.find(digest)) is not None:
                    return kept
                bundle.folder.rename(target)
            self.touch([digest])
            return replace(bundle, folder=target)

    def touch(self, digests: Iterable[str]) -> None:
        """Note that the bundles with these digests are in use now; whoever holds one for days says so each day."""
        for digest in digests:
            try:
                os.utime(self._folder / _checked(digest))
            except OSError as exc:  # gone, or a disk that only reads: then nobody can evict it either
                logger.debug("the use of bundle %s cannot be noted: %s", digest[:12], exc.strerror)

    def evict(self) -> None:
        """Remove bundles that no process has used for a week, but for the five used last; one that is asked for later
        is downloaded again. Raises StorageUnavailable."""
        if not self._folder.is_dir():
            return
        with disk_errors(self._folder):
            found = [path for path in self._folder.iterdir() if _DIGEST.fullmatch(path.name)]
            used = {path: path.stat().st_mtime for path in found}
            newest_first = sorted(found, key=lambda path: used[path], reverse=True)
            old = [path for path in newest_first[NEWEST_BUNDLES:] if used[path] < time.time() - UNUSED_S]
            if not old:
                return
            with self._scratch() as scratch:
                for path in old:
                    path.rename(scratch / path.name)  # at once: nobody finds half a bundle
                    logger.info("bundle %s was not used for long and is removed from this disk", path.name[:12])

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        """A folder on the same file system, gone afterwards with what is left in it."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for left in self._folder.glob(f"{_INCOMING}*"):
            if left.stat().st_mtime < time.time() - _ABANDONED_S:
                shutil.rmtree(left, ignore_errors=True)  # another process may be removing it, too
        path = Path(tempfile.mkdtemp(prefix=_INCOMING, dir=self._folder))
        try:
            yield path
        finally:
            shutil.rmtree(path)


def _checked(digest: str) -> str:
    # It comes from a tag that anybody who can write to MLflow can set, and becomes the name of a folder.
    if not _DIGEST.fullmatch(digest):
        raise UntrustedModel(f"{digest[:80]!r} is no bundle's digest; train and register the version again.")
    return digest


def fetch_bundle(registry: Registry, version: Version, folder: Path, *, fresh: bool = False) -> Bundle:
    """The bundle that `version` was registered with, every hash verified; kept under `folder` for the next call.

    `fresh` downloads it although it is kept: what is about to be signed must be what lies in the registry now. Raises
    as `BundleCache.fetch` does.
    """
    cache, digest = BundleCache(folder), version.tags.get(TAG_DIGEST, "")
    return (None if fresh else cache.find(digest)) or cache.fetch(registry, version, digest)


def _version(found: "ModelVersion") -> Version:
    return Version(
        model=found.name,
        version=str(found.version),
        run_id=found.run_id or "",
        tags=dict(found.tags),
        aliases=tuple(sorted(found.aliases)),
        created_at=found.creation_timestamp / 1000,
    )
