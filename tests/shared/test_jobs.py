"""Jobs outlive their workers, are done by one at a time, and end once."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
from medloop.errors import Conflict, InvalidRequest, NotFound, StorageUnavailable
from medloop.jobs import Handler, Job, JobInterrupted, Jobs, Progress, ProgressFn, Worker
from medloop.log import request_id
from medloop.schemas import JobPublic
from medloop.storage.records import RecordStore

LEASE_S = 30.0


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def jobs(records: RecordStore, clock: Clock) -> Jobs:
    return Jobs(records, clock)


def _claim(jobs: Jobs, worker: str = "w") -> Job:
    job = jobs.claim(["evaluation"], worker, LEASE_S)
    assert job is not None
    return job


def test_a_job_from_submission_to_result(jobs: Jobs, clock: Clock) -> None:
    submitted = jobs.submit("evaluation", "m/1/test", {"model": "m"})
    assert (submitted.status, submitted.token, submitted.attempts) == ("queued", 0, 0)
    claimed = _claim(jobs)
    assert (claimed.id, claimed.status, claimed.worker, claimed.token) == (submitted.id, "running", "w", 1)
    assert claimed.parameters == {"model": "m"}
    clock.now += 5
    told = jobs.heartbeat(claimed, Progress(done=3, total=9, step="score"))
    assert told == jobs.get(claimed.id)
    assert told.progress == Progress(done=3, total=9, step="score")
    assert told.lease_until is not None
    assert told.lease_until.timestamp() == clock.now + LEASE_S
    assert jobs.heartbeat(claimed).progress.done == 3  # renewing alone forgets nothing
    done = jobs.finish(claimed, {"accuracy": 0.5})
    assert done == jobs.get(claimed.id)
    assert (done.status, done.result, done.lease_until) == ("succeeded", {"accuracy": 0.5}, None)
    assert (done.updated_at - done.created_at).total_seconds() == 5
    assert jobs.claim(["evaluation"], "w", LEASE_S) is None
    assert JobPublic.model_validate(done.model_dump()).progress["total"] == 9


def test_the_same_work_is_one_job(jobs: Jobs) -> None:
    first = jobs.submit("evaluation", "key", {"x": 1})
    assert jobs.submit("evaluation", "key", {"x": 2}) == first
    claimed = _claim(jobs)
    assert jobs.submit("evaluation", "key", {}) == claimed
    done = jobs.finish(claimed, {})
    assert jobs.submit("evaluation", "key", {}) == done
    others = [jobs.submit("evaluation", "other", {}), jobs.submit("explanation", "key", {})]
    assert len({first.id, *(job.id for job in others)}) == 3


def test_submitted_by_many_at_once_it_is_one_job(jobs: Jobs) -> None:
    with ThreadPoolExecutor(8) as pool:
        submitted = list(pool.map(lambda _: jobs.submit("evaluation", "key", {}), range(16)))
    assert len({job.id for job in submitted}) == 1
    assert len(jobs.list()) == 1


def test_a_submitter_that_dies_half_way_leaves_nothing_stuck(jobs: Jobs, records: RecordStore) -> None:
    half = Jobs(cast("RecordStore", WithoutJobs(records)))
    with pytest.raises(StorageUnavailable):
        half.submit("evaluation", "key", {})
    assert jobs.list() == ()
    job = jobs.submit("evaluation", "key", {})
    assert jobs.list() == (job,)
    assert _claim(jobs).id == job.id


class WithoutJobs:
    """Records that fail whenever a job is put."""

    def __init__(self, records: RecordStore) -> None:
        self._records = records

    def __getattr__(self, name: str) -> Any:
        return getattr(self._records, name)

    def put_once(self, kind: str, record_id: str, document: Mapping[str, Any]) -> bool:
        if kind == "jobs":
            raise StorageUnavailable("gone")
        return self._records.put_once(kind, record_id, document)


def test_a_failed_job_may_be_submitted_again(jobs: Jobs) -> None:
    job = jobs.submit("evaluation", "key", {"x": 1})
    failed = jobs.fail(_claim(jobs), {"code": "internal", "detail": "no"})
    assert (failed.status, failed.problem) == ("failed", {"code": "internal", "detail": "no"})
    again = jobs.submit("evaluation", "key", {"x": 2})
    assert (again.id, again.status, again.problem, again.attempts) == (job.id, "queued", None, 0)
    assert again.parameters == {"x": 2}
    assert again.created_at == job.created_at
    assert _claim(jobs).token > failed.token


def test_the_oldest_of_the_wanted_types_is_claimed_first(jobs: Jobs) -> None:
    first = jobs.submit("evaluation", "1", {})
    second = jobs.submit("explanation", "2", {})
    third = jobs.submit("evaluation", "3", {})
    assert jobs.claim(["training"], "w", LEASE_S) is None
    claimed = [jobs.claim(["explanation", "evaluation"], "w", LEASE_S) for _ in range(4)]
    assert [job and job.id for job in claimed] == [first.id, second.id, third.id, None]
    assert [job.id for job in jobs.list()] == [third.id, second.id, first.id]
    assert [job.id for job in jobs.list(type="evaluation", status="running", limit=1)] == [third.id]


def test_each_job_is_claimed_by_one_worker(jobs: Jobs) -> None:
    submitted = {jobs.submit("evaluation", str(i), {}).id for i in range(12)}
    with ThreadPoolExecutor(6) as pool:
        claimed = list(pool.map(lambda i: jobs.claim(["evaluation"], f"w{i}", LEASE_S), range(18)))
    ids = [job.id for job in claimed if job is not None]
    assert len(ids) == len(set(ids))
    while (job := jobs.claim(["evaluation"], "last", LEASE_S)) is not None:
        ids.append(job.id)
    assert sorted(ids) == sorted(submitted)


def test_a_lease_holds_until_it_runs_out(jobs: Jobs, clock: Clock) -> None:
    jobs.submit("evaluation", "key", {})
    early = _claim(jobs, "early")
    clock.now += LEASE_S
    assert jobs.claim(["evaluation"], "late", LEASE_S) is None
    jobs.heartbeat(early)
    clock.now += LEASE_S
    assert jobs.claim(["evaluation"], "late", LEASE_S) is None
    clock.now += 0.001
    late = _claim(jobs, "late")
    assert (late.id, late.worker, late.token, late.attempts) == (early.id, "late", 2, 2)


def test_a_late_worker_changes_nothing(jobs: Jobs, clock: Clock) -> None:
    jobs.submit("evaluation", "key", {})
    early = _claim(jobs, "early")
    clock.now += LEASE_S + 1
    late = _claim(jobs, "late")

    def refused() -> None:
        before = jobs.get(early.id)
        attempts: list[Callable[[], Job]] = [
            lambda: jobs.heartbeat(early, Progress(done=1)),
            lambda: jobs.finish(early, {"by": "early"}),
            lambda: jobs.fail(early, {"by": "early"}),
            lambda: jobs.release(early),
        ]
        for attempt in attempts:
            with pytest.raises(Conflict):
                attempt()
        assert jobs.get(early.id) == before

    refused()
    assert jobs.finish(late, {"by": "late"}).result == {"by": "late"}
    refused()


def test_a_late_worker_stays_out_of_a_job_submitted_again(jobs: Jobs, clock: Clock) -> None:
    jobs.submit("evaluation", "key", {})
    early = _claim(jobs, "early")
    clock.now += LEASE_S + 1
    jobs.fail(_claim(jobs, "late"), {})
    jobs.submit("evaluation", "key", {})
    third = _claim(jobs, "third")
    with pytest.raises(Conflict):
        jobs.finish(early, {"by": "early"})
    assert jobs.get(third.id) == third


def test_settling_twice_is_settling_once(jobs: Jobs) -> None:
    jobs.submit("evaluation", "key", {})
    job = _claim(jobs)
    done = jobs.finish(job, {"n": 1})
    assert jobs.finish(job, {"n": 1}) == done  # as after an acknowledgement that was lost
    with pytest.raises(Conflict):
        jobs.fail(job, {})
    with pytest.raises(Conflict):
        jobs.release(job)
    with pytest.raises(Conflict):
        jobs.heartbeat(job)
    assert jobs.get(job.id) == done


def test_a_released_job_is_claimed_at_once_and_costs_no_attempt(jobs: Jobs) -> None:
    jobs.submit("evaluation", "key", {})
    for expected_token in (1, 2, 3, 4, 5):
        job = _claim(jobs)
        assert (job.token, job.attempts) == (expected_token, 1)
        jobs.release(job)


def test_a_job_that_ends_its_workers_fails(jobs: Jobs, clock: Clock) -> None:
    jobs.submit("evaluation", "deadly", {})
    for _ in range(3):
        deadly = _claim(jobs)
        clock.now += LEASE_S + 1
    harmless = jobs.submit("evaluation", "harmless", {})
    assert _claim(jobs).id == harmless.id
    failed = jobs.get(deadly.id)
    assert failed.status == "failed"
    assert failed.problem is not None
    assert "3 workers" in failed.problem["detail"]
    with pytest.raises(Conflict):
        jobs.finish(deadly, {})


def test_what_is_not_there(jobs: Jobs) -> None:
    with pytest.raises(NotFound, match="absent"):
        jobs.get("absent")
    assert jobs.list() == ()


def _eventually(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


StartWorker = Callable[[Handler], Worker]
LIVE_LEASE_S = 2.0
"""Renewed every two thirds of a second: long enough for a thread that comes late."""


@pytest.fixture
def live(records: RecordStore) -> Jobs:
    """Jobs on the real clock."""
    return Jobs(records)


@pytest.fixture
def start_worker(live: Jobs) -> Iterator[StartWorker]:
    workers: list[Worker] = []

    def start(handler: Handler) -> Worker:
        worker = Worker(live, {"evaluation": handler}, lease_seconds=LIVE_LEASE_S, poll_seconds=0.01)
        worker.start()
        workers.append(worker)
        return worker

    yield start
    assert all(worker.stop() for worker in workers)


def _ended(jobs: Jobs, job: Job) -> Job:
    _eventually(lambda: jobs.get(job.id).status in ("succeeded", "failed"))
    return jobs.get(job.id)


def test_a_worker_does_jobs_and_tells_their_progress(live: Jobs, start_worker: StartWorker) -> None:
    goes_on = threading.Event()

    def handler(job: Job, tell: ProgressFn) -> dict[str, Any]:
        tell(1, 2, "half")
        assert goes_on.wait(10)
        return {"double": job.parameters["x"] * 2, "request": request_id.get()}

    token = request_id.set("asked-by-me")
    job = live.submit("evaluation", "key", {"x": 21})
    request_id.reset(token)
    start_worker(handler)
    _eventually(lambda: live.get(job.id).progress == Progress(done=1, total=2, step="half"))
    goes_on.set()
    done = _ended(live, job)
    assert (done.status, done.result) == ("succeeded", {"double": 42, "request": "asked-by-me"})
    second = live.submit("evaluation", "another", {"x": 1})
    assert _ended(live, second).result == {"double": 2, "request": None}


def test_a_slow_handler_keeps_its_lease(live: Jobs, start_worker: StartWorker) -> None:
    def handler(job: Job, tell: ProgressFn) -> dict[str, Any]:
        time.sleep(1.2 * LIVE_LEASE_S)  # without a word
        return {"token": job.token}

    job = live.submit("evaluation", "key", {})
    start_worker(handler)
    start_worker(handler)
    assert _ended(live, job).result == {"token": 1}


def test_errors_become_the_jobs_problem(
    live: Jobs, start_worker: StartWorker, caplog: pytest.LogCaptureFixture
) -> None:
    def handler(job: Job, tell: ProgressFn) -> dict[str, Any]:
        if job.key == "ours":
            raise InvalidRequest("Name another split.", split="x")
        if job.key == "theirs":
            raise RuntimeError("a patient's name")
        return {"accuracy": float("nan") if job.key == "nan" else object()}

    with caplog.at_level(logging.WARNING):
        start_worker(handler)
        submitted = [live.submit("evaluation", key, {}) for key in ("ours", "theirs", "nan", "object")]
        problems = [_ended(live, job).problem or {} for job in submitted]
    assert problems[0] == {"code": "invalid-request", "status": 400, "detail": "Name another split.", "split": "x"}
    assert (problems[1]["code"], problems[1]["status"]) == ("internal", 500)
    assert "patient" not in str(problems[1])
    assert "RuntimeError" in caplog.text
    assert all("not JSON" in problem["detail"] for problem in problems[2:])


def test_a_stopped_worker_hands_its_job_back(live: Jobs, start_worker: StartWorker) -> None:
    begun = threading.Event()

    def endless(job: Job, tell: ProgressFn) -> dict[str, Any]:
        for done in range(100_000):
            tell(done, 100_000, "endless")
            begun.set()
            time.sleep(0.01)
        raise AssertionError("it was never interrupted")

    job = live.submit("evaluation", "key", {})
    worker = start_worker(endless)
    assert begun.wait(10)
    assert worker.stop()
    returned = live.get(job.id)
    assert (returned.status, returned.attempts, returned.token) == ("queued", 0, 1)


def test_a_job_that_does_not_end_in_time_is_given_back_all_the_same(live: Jobs, records: RecordStore) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def silent(job: Job, tell: ProgressFn) -> dict[str, Any]:
        begun.set()
        assert goes_on.wait(60)
        return {"by": "who was stopped"}

    job = live.submit("evaluation", "key", {})
    worker = Worker(live, {"evaluation": silent}, poll_seconds=0.01)
    worker.start()
    assert begun.wait(10)
    assert not worker.stop(0)
    returned = live.get(job.id)
    assert (returned.status, returned.attempts) == ("queued", 0)
    resumed = _claim(live, "another replica")
    goes_on.set()
    assert worker.stop(30)
    assert live.finish(resumed, {"by": "another"}).result == {"by": "another"}


def test_a_worker_that_hears_of_the_end_takes_nothing_more(live: Jobs) -> None:
    begun, draining = threading.Event(), threading.Event()

    def endless(job: Job, tell: ProgressFn) -> dict[str, Any]:
        while True:
            tell(0, 1, "endless")
            begun.set()
            time.sleep(0.01)

    first, second = (live.submit("evaluation", key, {}) for key in ("first", "second"))
    worker = Worker(live, {"evaluation": endless}, poll_seconds=0.01, stopping=draining.is_set)
    worker.start()
    assert begun.wait(10)
    draining.set()
    _eventually(lambda: live.get(first.id).status == "queued")
    assert worker.stop(30)
    assert [live.get(job.id).token for job in (first, second)] == [1, 0]


def test_records_that_hang_do_not_keep_a_worker_from_stopping(records: RecordStore) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    class Hanging:
        """Answers, until the job has begun."""

        def __getattr__(self, name: str) -> Any:
            if begun.is_set():
                assert goes_on.wait(60)
            return getattr(records, name)

    def silent(job: Job, tell: ProgressFn) -> dict[str, Any]:
        begun.set()
        assert goes_on.wait(60)
        return {}

    hanging: Any = Hanging()
    worker = Worker(Jobs(hanging), {"evaluation": silent}, poll_seconds=0.01)
    Jobs(records).submit("evaluation", "key", {})
    worker.start()
    assert begun.wait(10)
    stopped = threading.Thread(target=worker.stop, args=(0,))
    stopped.start()
    stopped.join(30)
    in_time = not stopped.is_alive()
    goes_on.set()
    assert worker.stop(30)
    assert in_time


def test_a_worker_that_lost_its_job_ends_it(live: Jobs, records: RecordStore, start_worker: StartWorker) -> None:
    begun, interrupted = threading.Event(), threading.Event()

    def handler(job: Job, tell: ProgressFn) -> dict[str, Any]:
        if job.token > 1:
            return {"by": "another"}
        begun.set()
        try:
            while True:
                tell(0, 0, "")
                time.sleep(0.01)
        except JobInterrupted:
            interrupted.set()
            raise

    job = live.submit("evaluation", "key", {})
    start_worker(handler)
    assert begun.wait(10)
    later = Jobs(records, lambda: time.time() + 3600)  # as if this process had slept for an hour
    taken = later.claim(["evaluation"], "another", LEASE_S)
    assert taken is not None
    assert interrupted.wait(10)
    later.finish(taken, {"by": "another"})
    assert live.get(job.id).result == {"by": "another"}


class Failing:
    """Records that fail while `down` is set; when told so only after the write was done."""

    def __init__(self, records: RecordStore) -> None:
        self._records = records
        self.down = threading.Event()
        self.failures = 0

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self._records, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            answer = verb(*args, **kwargs)
            if self.down.is_set():
                self.failures += 1
                raise StorageUnavailable("The answer was lost.")
            return answer

        return call


def test_a_result_waits_for_records_that_are_down(records: RecordStore) -> None:
    failing = Failing(records)
    jobs = Jobs(cast("RecordStore", failing))

    def handler(job: Job, tell: ProgressFn) -> dict[str, Any]:
        failing.down.set()
        return {"n": 1}

    job = Jobs(records).submit("evaluation", "key", {})
    worker = Worker(jobs, {"evaluation": handler}, lease_seconds=30, poll_seconds=0.01)
    worker.start()
    _eventually(lambda: failing.failures >= 3)
    failing.down.clear()
    done = _ended(Jobs(records), job)
    assert worker.stop()
    assert (done.result, done.attempts) == ({"n": 1}, 1)


def test_a_worker_outlives_an_outage(records: RecordStore) -> None:
    failing = Failing(records)
    failing.down.set()
    worker = Worker(
        Jobs(cast("RecordStore", failing)), {"evaluation": lambda job, tell: {}}, lease_seconds=30, poll_seconds=0.01
    )
    worker.start()
    _eventually(lambda: failing.failures >= 3)
    failing.down.clear()
    job = Jobs(records).submit("evaluation", "key", {})
    assert _ended(Jobs(records), job).status == "succeeded"
    assert worker.stop()
