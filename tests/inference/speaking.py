"""The protocols on a real predictor and a real network, without MLflow, records or background work: made in no time."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from medloop.bundle import Bundle, read_bundle
from medloop.errors import NoModel
from medloop.http import App, Readiness, create_app
from medloop.schemas import Approval
from medloop.settings import ServerSettings
from medloop.vision.dicom_reader import DicomReader
from medloop_inference import invocations, oip, stream
from medloop_inference.batcher import Settled
from medloop_inference.champion import Served, load
from medloop_inference.predict import Predictor
from medloop_inference.settings import QueueSettings


class Watcher:
    """Serves what it is given."""

    def __init__(self, served: Served | None) -> None:
        self._served = served

    def served(self) -> Served:
        if self._served is None:
            raise NoModel("no approved champion yet")
        return self._served

    def change(self, served: Served) -> None:
        self._served = served


@dataclass
class Ear:
    """Watch and sink: keeps what was settled."""

    told: Settled = field(default_factory=list)

    def batch(self, size: int, why: str, seconds: float) -> None:
        pass

    def stage(self, stage: str, seconds: float) -> None:
        pass

    def settled(self, settled: Settled) -> None:
        self.told += settled

    def delivered(self, settled: Settled) -> None:
        pass


class Service:
    """What the protocols need of `medloop_inference.service.Service`."""

    def __init__(self, bundle: Bundle | None) -> None:
        self.watcher = Watcher(None if bundle is None else load_version(bundle, "1"))
        self.ear = Ear()
        self.predictor: Any = Predictor(
            self.watcher.served, QueueSettings(), lanes=1, dicom=DicomReader(), watch=self.ear, sink=self.ear
        )

    def check_door(self) -> None:
        self.predictor.admission.check()


def load_version(bundle: Bundle, version: str) -> Served:
    return _load(bundle.digest, bundle.folder, version)


@cache
def _load(digest: str, folder: Path, version: str) -> Served:
    approval = Approval(
        sequence=1,
        action="approve",
        model="tiny",
        version=version,
        bundle_digest=digest,
        decision_id="d",
        approver="Dr. Test",
        key_id="k",
    )
    return load(read_bundle(folder), approval)


def speaking(bundle: Bundle | None, **settings: int) -> App:
    """An app that speaks all protocols and answers with `bundle`, version 1 of the model tiny."""
    readiness = Readiness()
    service = Service(bundle)
    predictor = service.predictor

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        predictor.start()
        if bundle is None:
            readiness.failed("no approved champion yet")
        else:
            readiness.passed()
        yield
        predictor.stop()

    routers = [oip.router, invocations.router, stream.router]
    app = create_app(
        "test",
        ServerSettings.model_validate(settings),
        routers=routers,
        readiness=readiness,
        lifespan=lifespan,
        streamed={stream.STREAMED},
        dialects={**oip.DIALECT, **invocations.DIALECT},
    )
    app.state.service = service
    return app
