"""An inference service of the test's own, and an evaluator small enough to see through: it only signs."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from medloop.approvals import Signer
from medloop.bundle import Bundle
from medloop.registry import CHAMPION, TAG_APPROVAL, Registry
from medloop.schemas import Approval
from medloop.settings import HomeSettings
from medloop.testing import asgi_client, register_bundle, tiny_bundle
from medloop.vision.encode import encode_png
from medloop_inference.app import create_app
from medloop_inference.champion import Watcher
from medloop_inference.service import Service
from medloop_inference.settings import ServingSettings, Settings

MODEL = "tiny"
NEVER = 3600.0  # seconds: the background thread polls once at the start, then the test does it


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "first", model=MODEL)


@pytest.fixture(scope="session")
def second(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Another bundle of the same model: it says "dark" far more often."""
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "second", model=MODEL, bias=3.0)


@dataclass
class Evaluator:
    """Registers bundles and approves them as the evaluator does, without its gate."""

    registry: Registry
    keys_dir: Path
    sequence: int = 0

    def register(self, bundle: Bundle) -> str:
        return register_bundle(self.registry, bundle).version

    def sign(self, version: str, bundle: Bundle) -> Approval:
        self.sequence += 1
        unsigned = Approval(
            sequence=self.sequence,
            action="approve",
            model=MODEL,
            version=version,
            bundle_digest=bundle.digest,
            decision_id="d",
            approver="Dr. Test",
            key_id="",
        )
        return Signer.open(self.keys_dir).sign(unsigned)

    def put_in_force(self, approval: Approval) -> None:
        text = approval.model_dump_json()
        self.registry.set_tag(MODEL, approval.version, TAG_APPROVAL, text)
        self.registry.set_model_tag(MODEL, TAG_APPROVAL, text)
        self.registry.set_alias(MODEL, CHAMPION, approval.version)

    def approve(self, version: str, bundle: Bundle) -> Approval:
        approval = self.sign(version, bundle)
        self.put_in_force(approval)
        return approval

    def champion(self, bundle: Bundle) -> str:
        """Register and approve at once; returns the version."""
        version = self.register(bundle)
        self.approve(version, bundle)
        return version


@pytest.fixture
def evaluator(registry: Registry, home: Path) -> Evaluator:
    return Evaluator(registry, HomeSettings().keys_dir)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watcher(registry: Registry, home: Path, clock: Clock) -> Watcher:
    return Watcher(MODEL, registry, HomeSettings(), clock=clock)


@pytest.fixture
def settings(home: Path, tracking_uri: str) -> Settings:
    return Settings(serving=ServingSettings(model=MODEL, poll_seconds=NEVER, engine_threads=1))


@pytest.fixture
def app(settings: Settings) -> FastAPI:
    return create_app(settings)


@pytest.fixture
def service(app: FastAPI) -> Service:
    found: Service = app.state.service
    return found


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with asgi_client(app) as http:
        yield http


@pytest.fixture(scope="session")
def grey() -> Callable[..., bytes]:
    """A PNG of one grey level, 0–255."""

    def make(level: int, size: int = 16) -> bytes:
        return encode_png(np.full((size, size), level, np.uint8))

    return make
