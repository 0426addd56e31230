"""The evaluator's API: parses, calls, returns."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import APIRouter, FastAPI, Response, status
from medloop.approvals import Signer, Verifier
from medloop.auth import check_signed
from medloop.data.manifest import Split
from medloop.errors import MedLoopError
from medloop.http import App, Readiness, require
from medloop.http import create_app as create_base_app
from medloop.jobs import Job, Jobs, ProgressFn, Worker
from medloop.registry import TAG_DATASET, TAG_DIGEST, Registry
from medloop.schemas import (
    Approval,
    ApprovalCreate,
    EngineCheckCreate,
    EvaluationCreate,
    EvaluationReport,
    GateCreate,
    GateDecision,
    JobPublic,
    Name,
    RollbackCreate,
    TimelineEntry,
    Version,
)
from medloop.storage.objects import open_objects
from medloop.storage.records import open_records

from medloop_evaluator.approve import Approver
from medloop_evaluator.engines import EngineChecker
from medloop_evaluator.evaluate import Evaluator
from medloop_evaluator.gate import Gate
from medloop_evaluator.ledger import Ledger
from medloop_evaluator.settings import EvaluatorSettings

logger = logging.getLogger(__name__)

JOB_TYPE = "evaluation"
CHECK_JOB_TYPE = "engine-check"
SELF_CHECK_SECONDS = 10.0
CLOSE_SECONDS = 1.0


def create_app(settings: EvaluatorSettings) -> App:
    """The evaluator. Opening its stores touches no network, so it starts while they are down and says so in
    `/readyz`. Raises StorageUnavailable when the signing key can be neither read nor made."""
    registry = Registry(settings.tracking.tracking_uri)
    objects = open_objects(settings.storage.objects_url)
    prompt_objects = open_objects(settings.storage.objects_url, within=settings.storage.objects_seconds)
    records = open_records(settings.storage.records_url)
    # Of jobs, and of the gate: where the champion has not answered these images yet, that reads them all.
    evaluator = Evaluator(registry, objects, settings.home)
    prompt_evaluator = Evaluator(registry, prompt_objects, settings.home)  # of requests for what is kept
    checker = EngineChecker(registry, objects, records, settings.home)
    gate = Gate(evaluator, records)
    signer = Signer.open(settings.home.keys_dir)
    ledger = Ledger(records, registry, Verifier.open(settings.home.keys_dir))
    approver = Approver(registry, records, gate, ledger, signer, settings.home)
    jobs = Jobs(records)
    readiness = Readiness()

    def run(job: Job, report: ProgressFn) -> dict[str, Any]:
        asked = EvaluationCreate.model_validate(job.parameters)
        version = registry.version(asked.model, asked.version)
        found = evaluator.evaluate(version, asked.split, lambda step, done, total: report(done, total, step))
        return {"model": asked.model, "version": asked.version, "split": asked.split, "images": found.images} | {
            name: figure.value for name, figure in found.metrics.items()
        }

    def check(job: Job, report: ProgressFn) -> dict[str, Any]:
        asked = EngineCheckCreate.model_validate(job.parameters)
        version = registry.version(asked.model, asked.version)
        found = checker.check(
            version, asked.engine, asked.precision, lambda step, done, total: report(done, total, step)
        )
        return found.model_dump(mode="json")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker = Worker(jobs, {JOB_TYPE: run, CHECK_JOB_TYPE: check}, stopping=lambda: readiness.draining)
        worker.start()
        checks = asyncio.create_task(keep_checking(readiness, [registry.ping, prompt_objects.ping, records.ping]))
        yield
        checks.cancel()
        with suppress(asyncio.CancelledError):
            await checks
        await asyncio.to_thread(worker.stop)
        with suppress(TimeoutError):  # records that hang lose nothing by it
            await asyncio.wait_for(asyncio.to_thread(records.close), CLOSE_SECONDS)

    return create_base_app(
        "evaluator",
        settings.server,
        routers=[
            _evaluations(registry, prompt_evaluator, jobs),
            _engines(registry, checker, jobs),
            _decisions(approver),
        ],
        readiness=readiness,
        lifespan=lifespan,
        auth=settings.auth,
    )


async def keep_checking(
    readiness: Readiness, checks: Sequence[Callable[[], None]], seconds: float = SELF_CHECK_SECONDS
) -> None:
    """Tell `readiness` every `seconds` how the checks end, until cancelled."""
    while True:
        try:
            for check in checks:
                await asyncio.to_thread(check)
        except MedLoopError as exc:
            readiness.failed(exc.detail)
        except Exception:
            # A check that ended would leave the last answer standing for good.
            logger.exception("the self-check failed unexpectedly")
            readiness.failed("The self-check failed unexpectedly; the evaluator's log says more.")
        else:
            readiness.passed()
        await asyncio.sleep(seconds)


def _evaluations(registry: Registry, evaluator: Evaluator, jobs: Jobs) -> APIRouter:
    router = APIRouter(tags=["evaluation"], dependencies=[require("evaluate")])

    @router.post("/evaluate", status_code=status.HTTP_202_ACCEPTED, summary="Evaluate a version on a split")
    def evaluate(request: EvaluationCreate) -> JobPublic:
        version = registry.version(request.model, request.version)  # an unknown one is told at once
        # The number alone could come to mean another bundle, in an MLflow that was set up anew.
        content = "/".join(version.tags.get(tag, "unnamed") for tag in (TAG_DIGEST, TAG_DATASET))
        key = f"{request.model}/{request.version}/{content}/{request.split}"
        job = jobs.submit(JOB_TYPE, key, request.model_dump(mode="json"))
        # One that is done, but whose report was lost since, is followed by another; whoever asks gets the same one.
        while job.status == "succeeded" and not evaluator.reported(version, request.split):
            job = jobs.submit(JOB_TYPE, f"{key}/after/{job.id}", request.model_dump(mode="json"))
        return _public(job)

    @router.get("/jobs/{job_id}", summary="How far an evaluation is")
    def job(job_id: str) -> JobPublic:
        return _public(jobs.get(job_id))

    @router.get("/reports/{model}/{version}", summary="The report of an evaluation")
    def report(model: Name, version: Version, split: Split = "test") -> EvaluationReport:
        return evaluator.report(registry.version(model, version), split)

    return router


def _engines(registry: Registry, checker: EngineChecker, jobs: Jobs) -> APIRouter:
    router = APIRouter(tags=["engines"], dependencies=[require("evaluate")])

    @router.post(
        "/engines/check", status_code=status.HTTP_202_ACCEPTED, summary="Compare an engine on the calibration split"
    )
    def check(request: EngineCheckCreate) -> JobPublic:
        version = registry.version(request.model, request.version)
        key = checker.key(version, request.engine, request.precision)
        return _public(jobs.submit(CHECK_JOB_TYPE, key, request.model_dump(mode="json")))

    return router


def _decisions(approver: Approver) -> APIRouter:
    router = APIRouter(tags=["decisions"])

    @router.post("/gate", dependencies=[require("evaluate")], summary="Compare a version with the champion")
    def gate(request: GateCreate) -> GateDecision:
        return approver.decide(request.model, request.version)

    @router.post(
        "/approvals",
        dependencies=[require("approve")],
        status_code=status.HTTP_201_CREATED,
        summary="Make a version the champion",
    )
    def approve(request: ApprovalCreate, response: Response) -> Approval:
        if not request.bootstrap:  # which is signed in nobody's name
            check_signed(request.approver, "approver")
        approval, new = approver.approve(request)
        if not new:
            response.status_code = status.HTTP_200_OK
        return approval

    @router.post(
        "/rollback",
        dependencies=[require("approve")],
        status_code=status.HTTP_201_CREATED,
        summary="Bring back the champion before this one",
    )
    def rollback(request: RollbackCreate, response: Response) -> Approval:
        check_signed(request.approver, "approver")
        approval, new = approver.rollback(request)
        if not new:
            response.status_code = status.HTTP_200_OK
        return approval

    @router.get(
        "/timeline/{model}", dependencies=[require("evaluate")], summary="Who made what the champion, when and why"
    )
    def timeline(model: Name) -> list[TimelineEntry]:
        return approver.timeline(model)

    return router


def _public(job: Job) -> JobPublic:
    return JobPublic.model_validate(job.model_dump())
