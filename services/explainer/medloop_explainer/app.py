"""The explainer's API: parses, calls, returns."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, HTTPException, Query, Request
from fastapi.concurrency import run_in_threadpool
from medloop.http import App, Readiness, require
from medloop.http import create_app as create_base_app
from medloop.jobs import Job, Jobs, ProgressFn, Worker
from medloop.registry import TAG_DATASET, TAG_DIGEST, Registry, translated
from medloop.schemas import Explanation, ExplanationCreate, JobPublic, Name, Version
from medloop.storage.objects import open_objects
from medloop.storage.records import open_records

from medloop_explainer.artifacts import FOLDER
from medloop_explainer.explain import Explainer
from medloop_explainer.methods import METHODS, parse_methods
from medloop_explainer.models import Models
from medloop_explainer.settings import ExplainerSettings

logger = logging.getLogger(__name__)

JOB_TYPE = "explanation"
IN_HAND = 5
"""Images that are explained or wait for it; one takes about a second, and more would wait longer than people do."""
RETRY_SECONDS = 5
CLOSE_SECONDS = 1.0


def create_app(settings: ExplainerSettings) -> App:
    """The explainer. It answers `/livez` at once and is ready when torch, Captum and shap are imported, which takes
    some ten seconds in the background."""
    registry = Registry(settings.tracking.tracking_uri)
    records = open_records(settings.storage.records_url)
    storage = settings.storage
    prompt_objects = open_objects(storage.objects_url, within=storage.objects_seconds)
    explainer = Explainer(Models(registry, settings.home), open_objects(storage.objects_url), prompt_objects)
    jobs = Jobs(records)
    readiness = Readiness()

    def run(job: Job, report: ProgressFn) -> dict[str, Any]:
        asked = ExplanationCreate.model_validate(job.parameters)
        index = explainer.explain_set(asked, lambda step, done, total: report(done, total, step))
        return {
            "model": asked.model,
            "version": asked.version,
            "run_id": index.model.run_id,
            "images": len(index.images),
            "quality": index.quality,
        }

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        warming = threading.Thread(target=_warm, args=(readiness,), name="warming", daemon=True)
        warming.start()
        worker = Worker(jobs, {JOB_TYPE: run}, stopping=lambda: readiness.draining)
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)
        with suppress(TimeoutError):  # records that hang lose nothing by it
            await asyncio.wait_for(asyncio.to_thread(records.close), CLOSE_SECONDS)

    return create_base_app(
        "explainer",
        settings.server,
        routers=[_router(explainer, jobs)],
        readiness=readiness,
        lifespan=lifespan,
        auth=settings.auth,
    )


def _warm(readiness: Readiness) -> None:
    try:
        import medloop_explainer.reasons  # noqa: F401, I001 - torch
        import captum.attr  # noqa: F401
        import shap  # noqa: F401
        import medloop.nets  # noqa: F401
    except ImportError as exc:
        logger.exception("a library cannot be imported")
        readiness.failed(f"{exc.name} cannot be imported; install the explainer's locked requirements.")
    else:
        readiness.passed()


class Desk:
    """Counts the images in hand, and refuses one too many while it is still cheap to."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_hand = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        # Only ever called on the event loop's thread, so counting needs no lock.
        if self.in_hand >= self.limit:
            raise HTTPException(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"{self.limit} images are being explained or wait for it; try again in {RETRY_SECONDS} seconds.",
                headers={"Retry-After": str(RETRY_SECONDS)},
            )
        self.in_hand += 1
        try:
            yield
        finally:
            self.in_hand -= 1


def _router(explainer: Explainer, jobs: Jobs) -> APIRouter:
    router = APIRouter(tags=["explanation"], dependencies=[require("explain")])
    desk = Desk(IN_HAND)

    @router.post(
        "/explain",
        summary="Why the model answers one image as it does",
        openapi_extra={"requestBody": {"required": True, "content": {"image/*": {}, "application/octet-stream": {}}}},
    )
    async def explain(
        request: Request,
        model: Annotated[Name, Query()],
        version: Annotated[Version | None, Query(description="default: the champion")] = None,
        target: Annotated[str | None, Query(description="a class; default: the predicted one")] = None,
        methods: Annotated[str, Query(description="comma-separated")] = ",".join(METHODS),
    ) -> Explanation:
        asked = parse_methods(methods)
        with desk.place():
            data = await request.body()
            # Not in the event loop's own few threads: what ends the service needs one of them.
            return await run_in_threadpool(
                lambda: explainer.explain(explainer.models.find(model, version), data, target, asked)
            )

    @router.post("/explanations", status_code=HTTPStatus.ACCEPTED, summary="Explain images of the version's data set")
    def explain_set(request: ExplanationCreate) -> JobPublic:
        version = explainer.models.find(request.model, request.version)  # an unknown one is told at once
        # The number alone could come to mean another bundle, in an MLflow that was set up anew.
        content = "/".join(version.tags.get(tag, "unnamed") for tag in (TAG_DIGEST, TAG_DATASET))
        key = f"{content}/{request.model_dump_json()}"
        job = jobs.submit(JOB_TYPE, key, request.model_dump(mode="json"))
        # One that is done, but whose index was lost since, is followed by another; whoever asks gets the same one.
        while job.status == "succeeded" and not _indexed(explainer.models.registry, version.run_id):
            job = jobs.submit(JOB_TYPE, f"{key}/after/{job.id}", request.model_dump(mode="json"))
        return _public(job)

    @router.get("/jobs/{job_id}", summary="How far a set is")
    def job(job_id: str) -> JobPublic:
        return _public(jobs.get(job_id))

    return router


def _indexed(registry: Registry, run_id: str) -> bool:
    with translated(registry.tracking_uri, f"Run {run_id}"):
        return any(file.path == f"{FOLDER}/index.json" for file in registry.client.list_artifacts(run_id, FOLDER))


def _public(job: Job) -> JobPublic:
    return JobPublic.model_validate(job.model_dump())
