"""What the trainer reads from its environment."""

from dataclasses import dataclass, field
from pathlib import Path

from medloop.data.shards import SMALLEST_MEMORY
from medloop.settings import HomeSettings, StorageSettings, TrackingSettings, read_settings
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class LoopSettings(BaseSettings):
    """`MEDLOOP_CHECKPOINT_STEPS`: at most so many steps lie between two checkpoints. `MEDLOOP_COMPILE`: whether forward
    passes of training go through `torch.compile`. A run keeps those that it began with."""

    model_config = SettingsConfigDict(env_prefix="MEDLOOP_", extra="ignore")

    checkpoint_steps: int = Field(default=50, ge=1)
    compile: bool = False


class PixelSettings(BaseSettings):
    """`MEDLOOP_CACHE_BYTES`: the most that the decoded images of one data set version may take on this machine's disk
    (unset: what is free); larger ones are streamed from objects. `MEDLOOP_STREAM_BYTES`: the memory that takes."""

    model_config = SettingsConfigDict(env_prefix="MEDLOOP_", extra="ignore")

    cache_bytes: int | None = Field(default=None, ge=0)
    stream_bytes: int = Field(default=512 * 2**20, ge=SMALLEST_MEMORY)


class SearchSettings(BaseSettings):
    """`MEDLOOP_SEARCH_URL`: the database of searches, `sqlite:///path` or `postgresql://…`. Unset, every model has a
    file under the home folder."""

    model_config = SettingsConfigDict(env_prefix="MEDLOOP_", extra="ignore")

    search_url: str | None = Field(default=None, repr=False)  # it may hold a password

    def url(self, model: str, home: Path) -> str:
        return self.search_url or f"sqlite:///{home.resolve() / 'search' / model}.db"


@dataclass(frozen=True, slots=True)
class TrainerSettings:
    """The shared groups, and the trainer's own."""

    home: HomeSettings = field(default_factory=HomeSettings)
    storage: StorageSettings = field(default_factory=StorageSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    loop: LoopSettings = field(default_factory=LoopSettings)
    search: SearchSettings = field(default_factory=SearchSettings)
    pixels: PixelSettings = field(default_factory=PixelSettings)


def read_trainer_settings() -> TrainerSettings:
    """Raises InvalidRequest, naming the variable that is not as it must be."""
    return read_settings(TrainerSettings)
