"""Jobs: long work that survives the worker doing it.

A job is a record. A worker claims it with a lease and gets a fencing token; while it works it renews the lease. When
it dies the lease runs out and another worker claims the job with a higher token, after which the first one, should it
come back, can change nothing (Gray and Cheriton 1989 on leases; Kleppmann 2016, "How to do distributed locking", on
tokens). Leases compare clocks of different machines, which must agree to within a few seconds.
"""

import heapq
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from hashlib import sha256
from itertools import chain
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticSerializationError
from uuid6 import uuid7

from medloop.errors import (
    Conflict,
    InvalidRequest,
    MedLoopError,
    NotFound,
    StorageFull,
    StorageUnavailable,
    Unavailable,
)
from medloop.log import request_id
from medloop.storage.records import Record, RecordStore, scan

logger = logging.getLogger(__name__)

ProgressFn = Callable[[int, int, str], None]
"""Called by a handler with what is done, of how much in all, and the name of the present step. It raises
`JobInterrupted` when the handler should end."""

Handler = Callable[["Job", ProgressFn], dict[str, Any]]

_ATTEMPTS = 3  # a job that ended as many workers would end the next one too
_GIVE_BACK_S = 1.0  # that records may take to hear that a job is given back
_CONFLICTS = 20  # how often a change is tried again when another one came between


class JobInterrupted(Exception):
    """The handler's job is to go on elsewhere, or does so already: let this pass."""


class Progress(BaseModel):
    model_config = ConfigDict(frozen=True)

    done: int = Field(default=0, ge=0)
    total: int = Field(default=0, ge=0)
    step: str = ""


class Job(BaseModel):
    """A job as its record was when it was read. `problem` has the members `code`, `status` and `detail`."""

    # NaN stays NaN, which records refuse, rather than turning into null unseen.
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    id: str
    type: str
    key: str
    """What makes two requests the same work, such as model, version and split."""
    status: Literal["queued", "running", "succeeded", "failed"] = "queued"
    parameters: dict[str, Any] = {}
    progress: Progress = Progress()
    result: dict[str, Any] | None = None
    problem: dict[str, Any] | None = None
    token: int = 0
    """Counts claims over the whole life of the job; only the holder of the latest may change it."""
    worker: str | None = None
    lease_seconds: float | None = None
    lease_until: AwareDatetime | None = None
    attempts: int = 0
    """Claims since it was last submitted."""
    request_id: str | None = None
    created_at: AwareDatetime
    updated_at: AwareDatetime


class Jobs:
    """Submits, claims and settles jobs in `records`; `clock` gives seconds since the epoch."""

    def __init__(self, records: RecordStore, clock: Callable[[], float] = time.time) -> None:
        self._records = records
        self._clock = clock

    def submit(self, type: str, key: str, parameters: Mapping[str, Any]) -> Job:
        """The job of this type and key: a new one, the one that is queued, running or done, or, if it failed, that
        one queued again with these parameters."""
        now = self._now()
        digest = sha256(f"{type}\0{key}".encode()).hexdigest()
        new = Job(
            id=str(uuid7()),
            type=type,
            key=key,
            parameters=dict(parameters),
            request_id=request_id.get(),
            created_at=now,
            updated_at=now,
        )
        # Of many submitters one names the job's id; whoever comes later makes that job if the first died before it.
        if not self._records.put_once("job_keys", digest, {"job_id": new.id}):
            named = self._records.get("job_keys", digest)
            if named is None:
                raise Conflict(f"The key of the {type} job vanished while it was read; try again.")
            new = new.model_copy(update={"id": named.document["job_id"]})
        self._records.put_once("jobs", new.id, _document(new))
        return self._change(new.id, lambda job: _again(job, new) if job.status == "failed" else job)

    def get(self, job_id: str) -> Job:
        """The job; raises `NotFound`."""
        return _job(self._read(job_id))

    def list(self, *, type: str | None = None, status: str | None = None, limit: int = 100) -> tuple[Job, ...]:
        """Up to `limit` jobs, newest first."""
        where = {name: value for name, value in (("type", type), ("status", status)) if value is not None}
        return tuple(_job(record) for record in self._records.find("jobs", where, limit=limit).items)

    def claim(self, types: Iterable[str], worker: str, lease_seconds: float) -> Job | None:
        """A job of these types for `worker` to do within a lease that it renews: one whose worker died, else the
        oldest that waits. None if there is none. A job that ended three workers fails instead."""
        types = tuple(types)
        for record in chain(self._with_status("running", types), self._with_status("queued", types)):
            job = _job(record)
            if job.lease_until is not None and job.lease_until >= self._now():
                continue
            claimed = self._claimed(job, worker, lease_seconds)
            if self._records.compare_and_set("jobs", job.id, record.revision, _document(claimed)):
                if claimed.status == "running":
                    return claimed
                logger.error("a job failed: its workers died", extra={"job_id": job.id, "job_type": job.type})
        return None

    def heartbeat(self, job: Job, progress: Progress | None = None) -> Job:
        """Renew the lease and tell the progress; raises `Conflict` if the job is another worker's by now."""
        changes: dict[str, Any] = {"status": "running"}
        changes["lease_until"] = self._now() + timedelta(seconds=job.lease_seconds or 0)
        if progress is not None:
            changes["progress"] = progress
        return self._change_held(job, changes)

    def finish(self, job: Job, result: Mapping[str, Any]) -> Job:
        """The job has succeeded; raises `Conflict` if it is another worker's by now."""
        return self._change_held(job, {"status": "succeeded", "lease_until": None, "result": dict(result)})

    def fail(self, job: Job, problem: Mapping[str, Any]) -> Job:
        """The job has failed; raises `Conflict` if it is another worker's by now."""
        return self._change_held(job, {"status": "failed", "lease_until": None, "problem": dict(problem)})

    def release(self, job: Job) -> Job:
        """Let another worker take the job at once, this attempt not counting; raises `Conflict` as `finish` does."""
        return self._change_held(job, {"status": "queued", "lease_until": None, "attempts": job.attempts - 1})

    def _with_status(self, status: str, types: tuple[str, ...]) -> Iterator[Record]:
        """The jobs of these types, oldest first."""
        found = (scan(self._records, "jobs", {"type": type, "status": status}, newest_first=False) for type in types)
        return heapq.merge(*found, key=lambda record: record.id)

    def _claimed(self, job: Job, worker: str, lease_seconds: float) -> Job:
        now = self._now()
        changes: dict[str, Any] = {"token": job.token + 1, "updated_at": now}
        if job.attempts >= _ATTEMPTS:
            detail = f"The {job.type} job ended {job.attempts} workers; see their logs, then submit it again."
            changes |= {"status": "failed", "lease_until": None, "problem": _problem(MedLoopError(detail))}
        else:
            lease_until = now + timedelta(seconds=lease_seconds)
            changes |= {"status": "running", "worker": worker, "attempts": job.attempts + 1, "progress": Progress()}
            changes |= {"lease_seconds": lease_seconds, "lease_until": lease_until}
        return job.model_copy(update=changes)

    def _change_held(self, job: Job, changes: Mapping[str, Any]) -> Job:
        """Change a job as the holder of its token."""

        def change(now: Job) -> Job:
            if now.token == job.token and now.status == changes["status"] != "running":
                return now  # the change was made before, but its acknowledgement was lost
            if now.token != job.token or now.status != "running":
                raise Conflict(f"The {job.type} job {job.id} is no longer this worker's; drop its result.")
            return now.model_copy(update=changes)

        return self._change(job.id, change)

    def _change(self, job_id: str, change: Callable[[Job], Job]) -> Job:
        """Store `change(job)`, worked out anew whenever somebody else's change came first."""
        for _ in range(_CONFLICTS):
            record = self._read(job_id)
            job = _job(record)
            changed = change(job)
            if changed is job:
                return job
            changed = changed.model_copy(update={"updated_at": self._now()})
            if self._records.compare_and_set("jobs", job_id, record.revision, _document(changed)):
                return changed
        raise Conflict(f"The job {job_id} is being changed by others all the time; try again.")

    def _read(self, job_id: str) -> Record:
        if (record := self._records.get("jobs", job_id)) is None:
            raise NotFound(f"There is no job {job_id}.")
        return record

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), UTC)


class Worker:
    """A thread that claims the jobs of its handlers one by one and does them, renewing the lease meanwhile.

    A handler's `MedLoopError` becomes the job's problem; any other error is logged with its traceback and becomes an
    `internal` problem that tells nothing more. Once `stopping` says so, it takes no more jobs and hands back the
    present one at its next progress, as after `stop`.
    """

    def __init__(
        self,
        jobs: Jobs,
        handlers: Mapping[str, Handler],
        *,
        stopping: Callable[[], bool] = lambda: False,
        name: str | None = None,
        lease_seconds: float = 30.0,
        poll_seconds: float = 0.5,
    ) -> None:
        self._jobs = jobs
        self._handlers = dict(handlers)
        self._told_to_stop = stopping
        self._job: Job | None = None
        self._name = name or f"{socket.gethostname()}-{os.getpid()}"
        self._lease_seconds = lease_seconds
        self._poll_seconds = poll_seconds
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"jobs-{self._name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> bool:
        """Take no more jobs and hand back the present one, at its next progress, or when `timeout` seconds (which fit
        into a service's `STOP_SECONDS`) are over: then this is False, and what its handler still gives counts for
        nothing. Another worker gets a job that could not be handed back when its lease has run out."""
        self._stopping.set()
        self._thread.join(max(0.0, timeout - _GIVE_BACK_S))
        if not self._thread.is_alive():
            return True
        if (job := self._job) is not None:
            giving = threading.Thread(target=self._give_back, args=(job,), name=f"giving-{job.id}", daemon=True)
            giving.start()
            giving.join(_GIVE_BACK_S)
        return not self._thread.is_alive()

    @property
    def _ending(self) -> bool:
        return self._stopping.is_set() or self._told_to_stop()

    def _give_back(self, job: Job) -> None:
        """From beside the thread that does it, or did until a moment ago."""
        try:
            self._jobs.release(job)
        except MedLoopError as exc:
            logger.warning("a job was not given back: %s", exc.detail, extra={"job_id": job.id})

    def _run(self) -> None:
        while not self._ending:
            try:
                job = self._jobs.claim(self._handlers, self._name, self._lease_seconds)
                if job is not None:
                    self._do(job)
                    continue
            except MedLoopError as exc:
                logger.warning("jobs wait: %s", exc.detail)
            except Exception:
                logger.exception("a job could not be settled; it is tried again when its lease has run out")
            self._stopping.wait(self._poll_seconds)

    def _do(self, job: Job) -> None:
        token = request_id.set(job.request_id)
        self._job = job
        try:
            with self._lease(job) as progress:
                settle = self._outcome(job, progress)
                self._settle(job, settle)
        finally:
            self._job = None
            request_id.reset(token)

    def _outcome(self, job: Job, progress: ProgressFn) -> Callable[[], Job]:
        """Do the work; gives how to settle the job."""
        try:
            return partial(self._jobs.finish, job, self._handlers[job.type](job, progress))
        except JobInterrupted:
            return partial(self._jobs.release, job)
        except MedLoopError as exc:
            logger.warning("a job failed: %s", exc.detail, extra={"job_id": job.id, "job_type": job.type})
            return partial(self._jobs.fail, job, _problem(exc))
        except Exception:
            logger.exception("a job failed unexpectedly", extra={"job_id": job.id, "job_type": job.type})
            unexpected = MedLoopError(f"The {job.type} job failed unexpectedly; the service's log says more.")
            return partial(self._jobs.fail, job, _problem(unexpected))

    def _settle(self, job: Job, settle: Callable[[], Job]) -> None:
        """Tell the records how the job ended, waiting for them while the worker is not stopped."""
        while True:
            try:
                settle()
            except Conflict as exc:
                logger.warning("a job went on elsewhere: %s", exc.detail, extra={"job_id": job.id})
            except InvalidRequest as exc:  # a result that is no JSON, or too large
                self._jobs.fail(job, _problem(exc))
            except (Unavailable, StorageFull) as exc:
                logger.warning("a job waits to be settled: %s", exc.detail, extra={"job_id": job.id})
                if not self._stopping.wait(self._poll_seconds):
                    continue
            return

    @contextmanager
    def _lease(self, job: Job) -> Iterator[ProgressFn]:
        """Renew the lease in the background; gives what the handler tells its progress by, which costs nothing."""
        latest: list[Progress] = []
        lost, ended = threading.Event(), threading.Event()

        def tell(done: int, total: int, step: str) -> None:
            latest[:] = [Progress(done=done, total=total, step=step)]
            if lost.is_set() or self._ending:
                raise JobInterrupted

        def renew() -> None:
            while not ended.wait(min(1.0, self._lease_seconds / 3)):
                try:
                    self._jobs.heartbeat(job, latest[0] if latest else None)
                except Conflict:
                    lost.set()
                    return
                except MedLoopError as exc:
                    logger.warning("a job's lease is not renewed: %s", exc.detail, extra={"job_id": job.id})

        thread = threading.Thread(target=renew, name=f"lease-{job.id}", daemon=True)
        thread.start()
        try:
            yield tell
        finally:
            ended.set()
            thread.join()


def _again(failed: Job, new: Job) -> Job:
    """A failed job queued again: the same id and token, all else as it is submitted now."""
    return new.model_copy(update={"id": failed.id, "token": failed.token, "created_at": failed.created_at})


def _problem(error: MedLoopError) -> dict[str, Any]:
    return {**error.extra, "code": error.code, "status": error.status, "detail": error.detail}


def _document(job: Job) -> dict[str, Any]:
    try:
        return job.model_dump(mode="json")
    except PydanticSerializationError as exc:
        raise InvalidRequest(f"What the {job.type} job was given or gave is not JSON: {exc}.") from exc


def _job(record: Record) -> Job:
    try:
        return Job.model_validate(record.document)
    except ValidationError as exc:
        raise StorageUnavailable(f"The job {record.id} was written by another version of MedLoop; update.") from exc
