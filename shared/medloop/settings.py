"""Settings from the environment, in small typed groups that each service composes.

Nothing is read at import time. Defaults describe the embedded state on one machine, under `MEDLOOP_HOME`.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from medloop.errors import InvalidRequest

Given = TypeVar("Given")
LogLevel = Annotated[
    Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"],
    BeforeValidator(lambda value: value.upper() if isinstance(value, str) else value),
]

PLACEHOLDER = "change-me"
"""What stands for a secret in `.env.example`."""
_READ = ("MEDLOOP_", "MLFLOW_", "AWS_")

DEFAULT_PORTS = {"mlflow": 5000, "explainer": 5005, "evaluator": 5006, "inference": 8080, "dashboard": 8501}


def find_home(start: Path | None = None) -> Path:
    """The nearest `.medloop/` in `start` (default: the working directory) or above, else `start/.medloop`."""
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / ".medloop").is_dir():
            return folder / ".medloop"
    return here / ".medloop"


class HomeSettings(BaseSettings):
    """Where this machine's own state lies: `MEDLOOP_HOME`.

    `MEDLOOP_TRUSTED_KEYS` is the folder of the public keys whose approvals inference believes. Unset, they lie beside
    what services keep themselves; one that only somebody else can write to is safer.
    """

    model_config = SettingsConfigDict(env_prefix="MEDLOOP_", extra="ignore")

    home: Path = Field(default_factory=find_home)
    trusted_keys: Annotated[Path | None, BeforeValidator(lambda value: value or None)] = None

    @property
    def cache_dir(self) -> Path:
        return self.home / "cache"

    @property
    def bundles_dir(self) -> Path:
        """Verified bundles that a service keeps on its own disk."""
        return self.home / "bundles"

    @property
    def keys_dir(self) -> Path:
        return self.home / "keys"

    @property
    def trusted_dir(self) -> Path:
        return self.trusted_keys or self.keys_dir


class StorageSettings(BaseSettings):
    """`MEDLOOP_OBJECTS_URL` (`file:///…` or `s3://bucket/prefix`) and `MEDLOOP_RECORDS_URL` (`sqlite:///…` or `mongodb://…`).

    Unset, both lie under the home folder. `MEDLOOP_OBJECTS_SECONDS` is how long one request waits for objects; work
    that nobody waits for is more patient.
    """

    model_config = SettingsConfigDict(env_prefix="MEDLOOP_", extra="ignore")

    home: Path = Field(default_factory=find_home)
    objects_url_: Annotated[str | None, Field(validation_alias="MEDLOOP_OBJECTS_URL", repr=False)] = None
    records_url_: Annotated[str | None, Field(validation_alias="MEDLOOP_RECORDS_URL", repr=False)] = None
    objects_seconds: float = Field(default=5.0, gt=0, le=3600)

    @property
    def objects_url(self) -> str:
        return self.objects_url_ or (self.home.resolve() / "objects").as_uri()

    @property
    def records_url(self) -> str:
        return self.records_url_ or f"sqlite:///{self.home.resolve() / 'records.sqlite'}"


class TrackingSettings(BaseSettings):
    """Where MLflow is: `MLFLOW_TRACKING_URI`; its credentials are MLflow's own variables, read by MLflow itself."""

    model_config = SettingsConfigDict(extra="ignore")

    tracking_uri: str = Field(
        default=f"http://127.0.0.1:{DEFAULT_PORTS['mlflow']}", validation_alias="MLFLOW_TRACKING_URI"
    )


class ServerSettings(BaseSettings):
    """Where a service listens: `MEDLOOP_HOST`, `MEDLOOP_PORT`, `MEDLOOP_LOG_LEVEL`, and how much it takes in.

    A client has `MEDLOOP_BODY_SECONDS` for the headers of a request, as long again for its body, and as long before it
    reads on in an answer. For
    `MEDLOOP_DRAIN_SECONDS` after SIGTERM new connections are still taken, so that a load balancer can notice.
    """

    model_config = SettingsConfigDict(env_prefix="MEDLOOP_", extra="ignore")

    host: str = "127.0.0.1"
    port: int | None = None
    log_level: LogLevel = "INFO"
    max_body_bytes: int = Field(default=64 * 2**20, gt=0)
    body_seconds: float = Field(default=30.0, gt=0)
    max_connections: int = Field(default=800, gt=0)
    """Below the 1,024 open files that a process may commonly have."""
    drain_seconds: float = Field(default=0.0, ge=0)


def check_placeholders(environment: Mapping[str, str]) -> None:
    """Raise InvalidRequest, naming the variables, where a secret was left as `.env.example` has it.

    It may also stand inside of an address. Variables of other programs are no business of ours.
    """
    left = [name for name, value in sorted(environment.items()) if name.startswith(_READ) and PLACEHOLDER in value]
    if left:
        raise InvalidRequest(
            f"{', '.join(left)} still {'has' if len(left) == 1 else 'have'} the placeholder {PLACEHOLDER}: anybody "
            "could know it. Give a secret of your own, such as: openssl rand -hex 24"
        )


def read_settings(read: Callable[[], Given]) -> Given:
    """What `read` finds in the environment; raises InvalidRequest, naming the variable that is not as it must be."""
    check_placeholders(os.environ)
    try:
        return read()
    except ValidationError as exc:
        first = exc.errors()[0]
        name = str(first["loc"][0]).upper() if first["loc"] else "The environment"
        if first["loc"] and not name.startswith(("MEDLOOP_", "MLFLOW_")):
            name = f"MEDLOOP_{name}"
        raise InvalidRequest(f"{name} is not set as it must be: {said(first)}.") from exc


def said(fault: Mapping[str, Any]) -> str:
    """What one fault of pydantic's says, without the prefix that it puts before the sentences of our own checks."""
    return str(fault["msg"]).removeprefix("Value error, ").rstrip(".")


def mask_url(url: str) -> str:
    """The address without user and password, fit for logs and messages."""
    # Up to the last @, whatever stands before it: a password may hold any character.
    return re.sub(r"(?<=://).*@", "", url, flags=re.DOTALL)
