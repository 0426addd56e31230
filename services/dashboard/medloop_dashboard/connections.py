"""The neighbours that the pages talk to, and what they said when it was not an answer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from medloop.clients import EvaluatorClient, ExplainerClient, InferenceClient
from medloop.errors import MedLoopError
from medloop.registry import Registry
from medloop.settings import StorageSettings, TrackingSettings
from medloop.storage.objects import ObjectStore, open_objects

from medloop_dashboard.settings import DashboardSettings

EXPLAIN_SECONDS = 120.0
"""How long a page waits for an explanation: SHAP of a large network on a busy processor takes a minute."""

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Connections:
    """Clients of the services, the registry and the stored images. None is touched before a page asks."""

    inference: InferenceClient
    evaluator: EvaluatorClient
    explainer: ExplainerClient
    registry: Registry
    objects: ObjectStore
    model: str | None
    """The registered model that pages open with."""

    @classmethod
    def open(cls) -> "Connections":
        """What the environment names."""
        settings = DashboardSettings()
        return cls(
            inference=InferenceClient(settings.inference_url),
            evaluator=EvaluatorClient(settings.evaluator_url),
            explainer=ExplainerClient(settings.explainer_url, timeout=EXPLAIN_SECONDS),
            registry=Registry(TrackingSettings().tracking_uri),
            objects=open_objects(StorageSettings().objects_url),
            model=settings.model,
        )

    def close(self) -> None:
        for client in (self.inference, self.evaluator, self.explainer):
            client.close()


def outcome(call: Callable[[], Value]) -> Value | MedLoopError:
    """What `call` returns, or the error it met: a page keeps either, so that a rerun does not ask again."""
    try:
        return call()
    except MedLoopError as error:
        return error
