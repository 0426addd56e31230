"""What the trainer reads from its environment."""

from dataclasses import dataclass, field

from medloop.settings import HomeSettings, StorageSettings, TrackingSettings, read_settings
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class LoopSettings(BaseSettings):
    """`MEDLOOP_CHECKPOINT_STEPS`: at most so many steps lie between two checkpoints. `MEDLOOP_COMPILE`: whether forward
    passes of training go through `torch.compile`. A run keeps those that it began with."""

    model_config = SettingsConfigDict(env_prefix="MEDLOOP_", extra="ignore")

    checkpoint_steps: int = Field(default=50, ge=1)
    compile: bool = False


@dataclass(frozen=True, slots=True)
class TrainerSettings:
    """The shared groups, and the loop's own."""

    home: HomeSettings = field(default_factory=HomeSettings)
    storage: StorageSettings = field(default_factory=StorageSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    loop: LoopSettings = field(default_factory=LoopSettings)


def read_trainer_settings() -> TrainerSettings:
    """Raises InvalidRequest, naming the variable that is not as it must be."""
    return read_settings(TrainerSettings)
