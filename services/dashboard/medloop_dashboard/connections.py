"""The neighbours that the pages talk to, and what they said when it was not an answer."""

import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import streamlit as st
from medloop.auth import AuthSettings
from medloop.clients import EvaluatorClient, ExplainerClient, InferenceClient
from medloop.errors import MedLoopError, Unauthenticated
from medloop.registry import Registry
from medloop.settings import StorageSettings, TrackingSettings
from medloop.storage.objects import ObjectStore, open_objects
from medloop.vision.dicom_reader import DicomReader

from medloop_dashboard.settings import DashboardSettings

if TYPE_CHECKING:
    from medloop.auth.signed_header import SignedHeader

EXPLAIN_SECONDS = 120.0
"""How long a page waits for an explanation: SHAP of a large network on a busy processor takes a minute."""

DICOM_SECONDS = 10.0
"""How long a page waits while other sessions' DICOM files are being decoded."""

SIGNED_IN_SECONDS = 12 * 3600.0
"""How long a page that stays open stands for whom the load balancer signed in: a shift, not the week of its cookie."""

_SIGNED_IN = "signed-in"

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
        settings, storage = DashboardSettings(), StorageSettings()
        return cls(
            inference=InferenceClient(settings.inference_url, act_as=person),
            evaluator=EvaluatorClient(settings.evaluator_url, act_as=person),
            explainer=ExplainerClient(settings.explainer_url, timeout=EXPLAIN_SECONDS, act_as=person),
            registry=Registry(TrackingSettings().tracking_uri),
            objects=open_objects(storage.objects_url, within=storage.objects_seconds),
            dicom=DicomReader(wait_seconds=DICOM_SECONDS),
            model=settings.model,
        )

    def close(self) -> None:
        for client in (self.inference, self.evaluator, self.explainer):
            client.close()
        self.dicom.close()


@dataclass(frozen=True, slots=True)
class _SignedIn:
    token: str = field(repr=False)
    name: str
    at: float
    """`time.monotonic()`, seconds."""


def person() -> str | None:
    """Who looks at the page, as far as anybody can know; None where services see the dashboard itself.

    Raises Unauthenticated or Unavailable where a load balancer's signature is to prove that and does not.
    """
    settings = DashboardSettings()
    return settings.person or signed_in(AuthSettings(), settings, st.context.headers, st.session_state)


def signed_in(
    auth: AuthSettings, settings: DashboardSettings, headers: Mapping[str, str], session: MutableMapping[Any, Any]
) -> str | None:
    """Whom the proxy in front has signed in, as `headers` say. Without one, anybody may have written that.

    `headers` are those that the page's connection was opened with, hours ago maybe, and what a load balancer signs is
    for one request and soon expires: it is checked once, when `session` first sees it.
    """
    if not auth.proxy:
        return None
    if settings.user_token_header is None:
        return headers.get(settings.user_header)
    token = headers.get(settings.user_token_header, "")
    known: _SignedIn | None = session.get(_SIGNED_IN)
    if known is None or known.token != token:
        name = _checker(settings, auth).check(token)
        known = session[_SIGNED_IN] = _SignedIn(token, name, time.monotonic())
    if time.monotonic() - known.at > SIGNED_IN_SECONDS:
        raise Unauthenticated("You signed in too long ago. Reload the page to sign in again.")
    return known.name


def _checker(settings: DashboardSettings, auth: AuthSettings) -> "SignedHeader":
    return _open_checker(
        settings.user_token_keys or "",
        settings.user_token_signer or "",
        settings.user_token_client,
        auth.oidc_issuer,
        auth.oidc_name_claim,
    )


@lru_cache(maxsize=1)
def _open_checker(keys: str, signer: str, client: str | None, issuer: str | None, name_claim: str) -> "SignedHeader":
    """One for all sessions, since it keeps the keys."""
    # Imported late: what checks signatures takes a while to load, and is rarely needed.
    from medloop.auth.signed_header import SignedHeader

    return SignedHeader(keys, signer, client, issuer, name_claim)


def outcome(call: Callable[[], Value]) -> Value | MedLoopError:
    """What `call` returns, or the error it met: a page keeps either, so that a rerun does not ask again."""
    try:
        return call()
    except MedLoopError as error:
        return error
