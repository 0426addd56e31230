"""The neighbours that the pages talk to, and what they said when it was not an answer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import streamlit as st
from medloop.auth import AuthSettings
from medloop.clients import EvaluatorClient, ExplainerClient, InferenceClient
from medloop.errors import MedLoopError
from medloop.registry import Registry
from medloop.settings import StorageSettings, TrackingSettings
from medloop.storage.objects import ObjectStore, open_objects
from medloop.vision.dicom_reader import DicomReader

from medloop_dashboard.settings import DashboardSettings

EXPLAIN_SECONDS = 120.0
"""How long a page waits for an explanation: SHAP of a large network on a busy processor takes a minute."""

DICOM_SECONDS = 10.0
"""How long a page waits while other sessions' DICOM files are being decoded."""

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Connections:
    """Clients of the services, the registry, the stored images and what decodes DICOM. None is touched before a page
    asks."""

    inference: InferenceClient
    evaluator: EvaluatorClient
    explainer: ExplainerClient
    registry: Registry
    objects: ObjectStore
    dicom: DicomReader
    model: str | None
    """The registered model that pages open with."""

    @classmethod
    def open(cls) -> "Connections":
        """What the environment names."""
        settings = DashboardSettings()
        return cls(
            inference=InferenceClient(settings.inference_url, act_as=person),
            evaluator=EvaluatorClient(settings.evaluator_url, act_as=person),
            explainer=ExplainerClient(settings.explainer_url, timeout=EXPLAIN_SECONDS, act_as=person),
            registry=Registry(TrackingSettings().tracking_uri),
            objects=open_objects(StorageSettings().objects_url),
            dicom=DicomReader(wait_seconds=DICOM_SECONDS),
            model=settings.model,
        )

    def close(self) -> None:
        for client in (self.inference, self.evaluator, self.explainer):
            client.close()
        self.dicom.close()


def person() -> str | None:
    """Who looks at the page, as far as anybody can know; None where services see the dashboard itself."""
    settings = DashboardSettings()
    return settings.person or signed_in(AuthSettings(), settings.user_header, st.context.headers)


def signed_in(auth: AuthSettings, header: str, headers: Mapping[str, str]) -> str | None:
    """Whom the proxy in front has signed in, as `header` says. Without one, anybody may have written that."""
    return headers.get(header) if auth.proxy else None


def outcome(call: Callable[[], Value]) -> Value | MedLoopError:
    """What `call` returns, or the error it met: a page keeps either, so that a rerun does not ask again."""
    try:
        return call()
    except MedLoopError as error:
        return error
