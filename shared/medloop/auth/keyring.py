"""The keys as a service knows them.

A background thread reads them from the records every few seconds and keeps what it read in a file (digests only), so
that records being down stops neither checks nor a restart. Keys that were revoked meanwhile work until the records
are back: a choice for availability, told in the log and as a problem of the service.
"""

import json
import logging
import os
import secrets
import threading
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from medloop.auth.keys import KIND, ApiKey, split
from medloop.errors import MedLoopError, StorageUnavailable, Unauthenticated
from medloop.schemas import now
from medloop.storage.records import RecordStore, scan

logger = logging.getLogger(__name__)

_WRONG = "The API key is not valid: it was mistyped, revoked or rotated."


class KeyRing:
    """Active keys by id. `problem` says why they may be old; None when they are not."""

    def __init__(self, records: RecordStore, file: Path, seconds: float) -> None:
        self.records = records
        self.file = file
        self.seconds = seconds
        self.problem: str | None = None
        self._keys: dict[str, ApiKey] | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Know the keys as of the last run at once, or else as on record, and follow them from now on."""
        self._keys = self._read_file()
        if self._keys is None:
            self.refresh()
        self._thread = threading.Thread(target=self._follow, name="api-keys", daemon=True)
        self._thread.start()

    def begin_stop(self) -> None:
        """Read no more; does not wait for a reading that is under way."""
        self._stop.set()

    def stop(self, timeout: float = 1.0) -> None:
        """End; a reading that takes longer than `timeout` seconds is given up, since nothing is lost with it."""
        self.begin_stop()
        if self._thread is not None:
            self._thread.join(timeout)
        self.records.close()

    @property
    def unready_reason(self) -> str | None:
        """Why no key can be checked, as long as none were ever read; not even an empty list of them."""
        if self._keys is not None:
            return None
        return "API keys cannot be checked yet: the records do not answer"

    def check(self, text: str) -> ApiKey:
        """The key whose text this is.

        Raises Unauthenticated when there is none, StorageUnavailable when no keys could be read yet.
        """
        keys = self._keys
        if keys is None:
            raise StorageUnavailable(f"{self.unready_reason}. Try again soon.")
        parts = split(text)
        key = keys.get(parts[0]) if parts else None
        at = now()
        if parts is None or key is None or not key.opened_by(parts[1], at):
            raise Unauthenticated(_WRONG)
        if key.expires_at is not None and at >= key.expires_at:
            raise Unauthenticated(f"The API key expired on {key.expires_at:%Y-%m-%d}; ask for a new one.")
        return key

    def refresh(self) -> None:
        """Read the keys from the records; what is known stays when they do not answer."""
        try:
            found = {record.id: record.document for record in scan(self.records, KIND, {"status": "active"})}
        except MedLoopError as exc:
            if self.problem is None:
                logger.warning("API keys cannot be read anew: %s", exc.detail)
            known = (
                "are as last read, and one revoked since still works" if self._keys is not None else "were never read"
            )
            self.problem = f"API keys {known}: {exc.detail}"
            return
        if self.problem is not None:
            logger.info("API keys are read again")
        keys = {key.id: key for key_id, document in found.items() if (key := _valid(key_id, document)) is not None}
        if keys != self._keys:
            self._keys = keys
            self._write_file(list(keys.values()))
        self.problem = None

    def _follow(self) -> None:
        while not self._stop.is_set():
            try:
                self.refresh()
            except Exception:
                # A thread that ended would leave revoked keys working for good.
                logger.exception("reading the API keys failed unexpectedly")
                self.problem = "Reading the API keys failed unexpectedly; the log says more."
            self._stop.wait(self.seconds)

    def _read_file(self) -> dict[str, ApiKey] | None:
        try:
            document = json.loads(self.file.read_bytes())
            keys = [ApiKey.model_validate(item) for item in document["keys"]]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as exc:  # pydantic's ValidationError is a ValueError
            logger.warning("the kept API keys in %s cannot be used: %s", self.file, type(exc).__name__)
            return None
        return {key.id: key for key in keys}

    def _write_file(self, keys: Sequence[ApiKey]) -> None:
        document = {"schema_version": 1, "keys": [key.model_dump(mode="json") for key in keys]}
        # Not the process's number: in every container that shares this home it is 1.
        temporary = self.file.with_name(f"{self.file.name}.{secrets.token_hex(8)}.tmp")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
                json.dump(document, out)
                out.flush()
                os.fsync(out.fileno())
            temporary.replace(self.file)
        except OSError as exc:
            # Checking goes on from memory; only a restart without records would miss it.
            logger.warning("the API keys cannot be kept in %s: %s", self.file, exc.strerror)


def _valid(key_id: str, document: object) -> ApiKey | None:
    try:
        return ApiKey.model_validate(document)
    except ValidationError:
        # One damaged record must not lock everybody out.
        logger.warning("the record of an API key is damaged", extra={"key_id": key_id})
        return None
