"""Bundles on this machine's disk, by digest: downloaded once, verified every time."""

import errno
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from medloop.bundle import Bundle, read_bundle
from medloop.errors import UntrustedModel
from medloop.registry import Registry

from medloop_inference.disk import disk_errors

logger = logging.getLogger(__name__)

_INCOMING = ".incoming-"
_ABANDONED_S = 3600.0
"""A download this old belongs to a process that was killed."""


class BundleCache:
    """Bundles under `folder`, each in a folder named by its digest; several processes may share it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, digest: str) -> Bundle | None:
        """The bundle if it is here and still what its digest says; one that is damaged is thrown away."""
        folder = self._folder / digest
        with disk_errors(self._folder):
            if not folder.is_dir():
                return None
            try:
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

    def fetch(self, registry: Registry, model: str, version: str, digest: str) -> Bundle:
        """Download the bundle of a version, verify it and keep it.

        Raises UntrustedModel for anything but the bundle with `digest`, NotFound, TrackingUnavailable, and
        StorageFull or StorageUnavailable for this machine's disk.
        """
        with disk_errors(self._folder), self._scratch() as scratch:
            bundle = read_bundle(registry.download_bundle(registry.version(model, version), scratch / "download"))
            if bundle.digest != digest:
                raise UntrustedModel(
                    f"The bundle that MLflow has for version {version} is not the one that was approved: "
                    f"its digest is {bundle.digest[:12]}…, the approval's is {digest[:12]}…."
                )
            target = self._folder / digest
            try:
                bundle.folder.rename(target)
            except OSError as exc:
                if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                return read_bundle(target)  # another process was faster
            return replace(bundle, folder=target)

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
