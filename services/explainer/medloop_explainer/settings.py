"""What the explainer reads from its environment: the shared groups, composed."""

from dataclasses import dataclass, field

from medloop.auth import AuthSettings
from medloop.settings import HomeSettings, ServerSettings, StorageSettings, TrackingSettings


@dataclass(frozen=True, slots=True)
class ExplainerSettings:
    home: HomeSettings = field(default_factory=HomeSettings)
    storage: StorageSettings = field(default_factory=StorageSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    auth: AuthSettings = field(default_factory=AuthSettings)
