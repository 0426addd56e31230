"""The settings of inference: the shared groups, and its own."""

from dataclasses import dataclass, field

from medloop.auth import AuthSettings
from medloop.schemas import Name
from medloop.settings import HomeSettings, ServerSettings, StorageSettings, TrackingSettings
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class ServingSettings(BaseSettings):
    """What is served, and how closely its champion is followed.

    `MEDLOOP_MODEL` names the registered model; it need not exist yet. `MEDLOOP_POLL_SECONDS` is the time between two
    looks at its champion alias. `MEDLOOP_ENGINE_THREADS` bounds the threads of one run of the network; unset, ONNX
    Runtime takes one for each core.
    """

    model_config = SettingsConfigDict(env_prefix="MEDLOOP_", extra="ignore")

    model: Name
    poll_seconds: float = Field(default=2.0, gt=0)
    engine_threads: int | None = Field(default=None, ge=1)


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that inference is told from outside."""

    serving: ServingSettings = field(default_factory=ServingSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    home: HomeSettings = field(default_factory=HomeSettings)
    storage: StorageSettings = field(default_factory=StorageSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    auth: AuthSettings = field(default_factory=AuthSettings)
