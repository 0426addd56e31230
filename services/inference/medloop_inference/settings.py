"""The settings of inference: the shared groups, and its own."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from medloop.auth import AuthSettings
from medloop.schemas import Fraction, Name
from medloop.settings import HomeSettings, ServerSettings, StorageSettings, TrackingSettings
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class _Group(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="MEDLOOP_", extra="ignore")


class ServingSettings(_Group):
    """What is served, and how closely its champion is followed.

    `MEDLOOP_MODEL` names the registered model; it need not exist yet. `MEDLOOP_POLL_SECONDS` is the time between two
    looks at its aliases. `MEDLOOP_SHADOW_SHARE` of the answered images are also shown to the challenger.
    """

    model: Name
    poll_seconds: float = Field(default=2.0, gt=0)
    shadow_share: Fraction = 0.0


class EngineSettings(_Group):
    """What runs the network. A version means float32 on ONNX Runtime; another `MEDLOOP_ENGINE` or `MEDLOOP_PRECISION`
    serves only a version that the evaluator checked with it. `MEDLOOP_ENGINE_THREADS` is the number of threads of one
    run, 1 when unset, which costs least; as many runs go on at once as the processors have room for.
    """

    engine: Literal["onnxruntime", "openvino"] = "onnxruntime"
    precision: Literal["float32", "bfloat16"] = "float32"
    engine_threads: int | None = Field(default=None, ge=1)


class QueueSettings(_Group):
    """How much may wait. `MEDLOOP_TARGET_MS` is how long an answer may take, in milliseconds, at the 95th percentile;
    what could not be answered within it is refused. `MEDLOOP_QUEUE_IMAGES` and `MEDLOOP_QUEUE_BYTES` bound what
    waits in any case.
    """

    target_ms: float = Field(default=1000.0, gt=0)
    queue_images: int = Field(default=1024, ge=1)
    queue_bytes: int = Field(default=256 * 2**20, gt=0)


class RecordingSettings(_Group):
    """What is kept of a prediction. `MEDLOOP_STORE_IMAGES` also keeps the image, freed of metadata. Records wait in
    `MEDLOOP_SPOOL_DIR` (default: under the home folder), at most `MEDLOOP_SPOOL_MAX_BYTES` of them.
    """

    store_images: bool = False
    spool_dir: Path | None = None
    spool_max_bytes: int = Field(default=256 * 2**20, ge=2**20)


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that inference is told from outside."""

    serving: ServingSettings = field(default_factory=ServingSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    queue: QueueSettings = field(default_factory=QueueSettings)
    recording: RecordingSettings = field(default_factory=RecordingSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    home: HomeSettings = field(default_factory=HomeSettings)
    storage: StorageSettings = field(default_factory=StorageSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    auth: AuthSettings = field(default_factory=AuthSettings)
