"""What this machine served last, on its own disk: where to start while MLflow is down, and which approvals are old."""

import os
import secrets
from pathlib import Path

from medloop.errors import UntrustedModel
from medloop.schemas import Approval
from medloop.storage.disk import disk_errors
from pydantic import ValidationError


class LastServed:
    """The approval that was accepted last, in one file. It names model, version, bundle digest and sequence, and is
    signed, so nothing else need be kept or trusted."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Approval | None:
        """The approval; None when nothing was served yet. Raises UntrustedModel or StorageUnavailable."""
        try:
            with disk_errors(self.path):
                return Approval.model_validate_json(self.path.read_bytes()) if self.path.exists() else None
        except ValidationError as exc:
            raise UntrustedModel(f"{self.path} is damaged; the next champion replaces it.") from exc

    def write(self, approval: Approval) -> None:
        """Replace the file, durably and in one step. Raises StorageFull or StorageUnavailable."""
        # Not the process's number: in every container that shares this home it is 1.
        temporary = self.path.with_suffix(f".{secrets.token_hex(8)}")
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            try:
                with temporary.open("x") as file:
                    file.write(approval.model_dump_json())
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(self.path)
            finally:
                temporary.unlink(missing_ok=True)
