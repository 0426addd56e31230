"""`python -m k8s.overlays.dev.make_secrets`: what the dev overlay needs and nobody should know.

Passwords and the key that signs approvals are drawn; where objects lie and the keys of that bucket come from the
environment. Everything goes into `secrets/` beside this file, which git ignores. What is there already stays: the
databases know their passwords by now, and inference trusts the signing key.
"""

import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path

from medloop.approvals import PRIVATE_KEY_FILE, PUBLIC_KEY_FILE, Signer
from medloop.auth.keys import PREFIX
from medloop.errors import Conflict, InvalidRequest, MedLoopError

FOLDER = Path(__file__).parent / "secrets"
_BUCKET = "MEDLOOP_OBJECTS_URL"
_REQUIRED = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")
_OPTIONAL = ("AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3")


def write(folder: Path, environment: Mapping[str, str]) -> None:
    """Make `folder` with one file for each Secret.

    Raises Conflict when it is there already, InvalidRequest for a variable that is missing.
    """
    for name in (_BUCKET, *_REQUIRED):
        if not environment.get(name):
            raise InvalidRequest(f"{name} is not set: the dev overlay keeps objects in an S3 bucket of yours.")
    bucket = environment[_BUCKET].rstrip("/")
    if not bucket.startswith("s3://"):
        raise InvalidRequest(f"{_BUCKET} must be s3://bucket/prefix: Pods share no folder.")
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError as exc:
        raise Conflict(
            f"{folder} is there already, and the databases know its passwords; delete both together."
        ) from exc
    mongodb, postgres = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
    server = f"postgresql+psycopg://medloop:{postgres}@postgres:5432"
    files = {
        "bucket": {_BUCKET: bucket, "MLFLOW_DEFAULT_ARTIFACT_ROOT": f"{bucket}/mlflow"},
        "objects": {name: environment[name] for name in (*_REQUIRED, *_OPTIONAL) if environment.get(name)},
        "records": {"MEDLOOP_RECORDS_URL": f"mongodb://medloop:{mongodb}@mongodb:27017/medloop?authSource=admin"},
        "mlflow-database": {"MLFLOW_BACKEND_STORE_URI": f"{server}/mlflow"},
        "search-database": {"MEDLOOP_SEARCH_URL": f"{server}/search"},
        "dashboard-key": {"MEDLOOP_API_KEY": f"{PREFIX}{secrets.token_hex(6)}_{secrets.token_urlsafe(32)}"},
        "mongodb": {"MONGO_INITDB_ROOT_USERNAME": "medloop", "MONGO_INITDB_ROOT_PASSWORD": mongodb},
        "postgres": {"POSTGRES_USER": "medloop", "POSTGRES_PASSWORD": postgres, "POSTGRES_DB": "mlflow"},
    }
    for name, variables in files.items():
        text = "".join(f"{key}={value}\n" for key, value in variables.items())
        (folder / f"{name}.env").touch(mode=0o600)
        (folder / f"{name}.env").write_text(text)
    Signer.open(folder)


def main() -> int:
    try:
        write(FOLDER, os.environ)
    except MedLoopError as exc:
        sys.stderr.write(f"{exc.detail}\n")
        return exc.exit_status
    sys.stdout.write(f"Wrote {FOLDER}, with {PRIVATE_KEY_FILE} and {PUBLIC_KEY_FILE}. Keep it to yourself.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
