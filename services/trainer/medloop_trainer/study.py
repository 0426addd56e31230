"""A study: one search that any number of processes, on any number of machines, work on by way of one database.

Each asks for a point (TPE: Bergstra et al. 2011, jointly over all dimensions), trains there, and tells what came of it.
A trial that is not among the best third of those that came as far is left (asynchronous successive halving: Li et al.
2020). While a process trains it gives signs of life; when these stop, another one tries its point again.

Optuna's RDB storage keeps numbers as numbers and everything else as JSON, so nothing is unpickled here. (Its journal
storage and its CMA-ES sampler do that, and are not used.)
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Literal

import optuna
from medloop.errors import Conflict, Preempted, StorageFull, TrainingFailed, Unavailable
from medloop.vision.prepare import PreparationSpec
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from medloop_trainer.attempt import Attempt, Halving, Pruned, Taken, still_ours
from medloop_trainer.database import DATABASE_ERRORS, Signs, database_errors, experimental, open_database
from medloop_trainer.space import Between, OneOf, Point, Space, Value
from medloop_trainer.stop import Stop

log = logging.getLogger(__name__)

_BOUND = "medloop.bound"
_BEGINNING = 30.0  # seconds that whoever makes a study has until others do what it did not come to
_PAUSE = 1.0  # seconds between two looks at a database where nothing is to do


class Bound(BaseModel):
    """What all trials of a study have in common; without it they could not be compared. `trial` are the options that
    every trial is trained with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    dataset_id: str
    preparation: PreparationSpec
    space: Space
    trial: dict[str, JsonValue]

    def differs(self, other: "Bound") -> str | None:
        """What, in words, is not the same in `other`."""
        words = {
            "model": "another model",
            "dataset_id": "another data set version",
            "preparation": "images prepared in another way",
            "space": "another space (its version, or the number of images, changed)",
            "trial": "trials of other options",
        }
        return next((said for name, said in words.items() if getattr(self, name) != getattr(other, name)), None)


class _Document(BaseModel):
    """A study's attribute, written once."""

    model_config = ConfigDict(extra="forbid")

    bound: Bound
    run_id: str


class Study:
    """See the module. `run_id` is the run that all trials' runs are children of."""

    def __init__(
        self,
        url: str,
        study: optuna.Study,
        storage: RDBStorage,
        document: "_Document",
        signs: Signs,
        mourn: Callable[[str], object],
    ) -> None:
        self.name, self.run_id, self._space = study.study_name, document.run_id, document.bound.space
        self._url, self._study, self._storage, self._signs, self._mourn = url, study, storage, signs, mourn
        storage.heartbeat_stale_trial_callback = self._lost

    def work(
        self,
        train: Callable[[Attempt], float],
        *,
        trials: int,
        stop: Stop,
        seconds: float = float("inf"),
        watch: Callable[[int], object] | None = None,
    ) -> None:
        """Try points until the study has `trials` trials that came to an end, whoever made them, or for `seconds`: none
        is begun after that. `train` returns how good a point is, less being better; `watch` hears how many have ended.

        With p processes up to p − 1 trials more may be made. Raises Preempted when `stop` was requested; the point goes
        back to the study then, as it does when a store does not answer. Raises StorageUnavailable and StorageFull, and
        what `train` does, other than TrainingFailed: a point that nothing can be learnt at is a bad one.
        """
        began = time.monotonic()
        while not stop.requested and time.monotonic() - began < seconds:
            self._sweep()
            counts = self.counts()
            ended = counts["complete"] + counts["pruned"]
            if watch:
                watch(ended)
            if ended >= trials:
                return
            if ended + counts["running"] < trials or counts["waiting"]:
                self._one(train)
            else:
                time.sleep(_PAUSE)  # others are at the last ones, and may die
        if stop.requested:
            raise Preempted(f"The search was stopped; the same command goes on with study {self.name}.")

    def counts(self) -> "Counter[Literal['complete', 'pruned', 'failed', 'running', 'waiting']]":
        return Counter(state_of(trial) for trial in self.trials())

    def busy(self) -> bool:
        """Whether a process is at a trial."""
        return self.counts()["running"] > 0

    def trials(self) -> list[FrozenTrial]:
        with database_errors(self._url):
            return self._study.get_trials(deepcopy=False)

    def best(self) -> FrozenTrial | None:
        """The best trial that came to its end."""
        ended = [trial for trial in self.trials() if trial.state == TrialState.COMPLETE]
        return min(ended, key=lambda trial: (trial.value, trial.number), default=None)

    def importance(self) -> dict[str, float]:
        """How much each dimension has to do with being among the best trials that came to their end, in shares of 1,
        most first (PED-ANOVA: Watanabe et al. 2023); empty as long as there are too few."""
        ended = [trial for trial in self.trials() if trial.state == TrialState.COMPLETE]
        if len({trial.value for trial in ended}) < 2 * _TOP:
            return {}
        best = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=max(0.1, _TOP / len(ended)))
        return optuna.importance.get_param_importances(self._study, evaluator=best)

    def _one(self, train: Callable[[Attempt], float]) -> None:
        with database_errors(self._url):
            with experimental():
                trial = self._study.ask()
            with self._alive(trial):
                try:
                    with still_ours(trial.number):
                        point = {each.name: _suggest(trial, each) for each in self._space.dimensions}
                    value = train(Attempt(trial, point))
                except (Pruned, TrainingFailed) as exc:
                    self._end(trial, TrialState.PRUNED, exc)
                except Taken as exc:
                    log.warning("%s was not heard of for too long; another process tries its point again", exc)
                except BaseException as exc:
                    self._give_back(trial, exc)
                    if isinstance(exc, SystemExit | Preempted):
                        raise Preempted(
                            f"The search was stopped in trial {trial.number}; the same command goes on with it."
                        ) from exc
                    raise
                else:
                    self._study.tell(trial, value, skip_if_finished=True)

    def _end(self, trial: optuna.Trial, state: TrialState, exc: BaseException) -> None:
        try:
            trial.set_user_attr("reason", str(exc) or type(exc).__name__)
        except UpdateFinishedTrialError:  # somebody else ended it
            return
        self._study.tell(trial, state=state, skip_if_finished=True)

    def _give_back(self, trial: optuna.Trial, exc: BaseException) -> None:
        """Mark the trial as failed; where the reason lies outside of it, the point is tried again."""
        outside = (Preempted, Unavailable, StorageFull, *DATABASE_ERRORS)
        try:
            self._end(trial, TrialState.FAIL, exc)
            if not isinstance(exc, Exception) or isinstance(exc, outside):
                self._again(self.trials()[trial.number], more=0)
        except DATABASE_ERRORS as problem:
            log.warning("trial %d could not be given back; others try its point later: %s", trial.number, problem)

    def _again(self, trial: FrozenTrial, *, more: int) -> None:
        facts, point = trial.user_attrs, trial.params or trial.system_attrs.get("fixed_params")
        retries = facts.get("retries", 0) + more
        if retries > self._signs.retries:
            log.warning("the processes of trial %d and its retries died; its point is left", trial.number)
        elif point:
            kept = {name: facts[name] for name in ("recipe",) if name in facts}
            self._study.enqueue_trial(point, user_attrs={**kept, "retries": retries, "retry_of": trial.number})

    def _sweep(self) -> None:
        """Find trials whose processes died."""
        with database_errors(self._url), experimental():
            optuna.storages.fail_stale_trials(self._study)
            for trial in self.trials():
                if self._never_began(trial):
                    try:
                        self._study.tell(trial.number, state=TrialState.FAIL)
                    except ValueError:  # another process was faster
                        continue
                    self._lost(self._study, trial)

    def _never_began(self, trial: FrozenTrial) -> bool:
        """Whether its process died between asking and its first sign of life, which comes before the point is set."""
        if trial.state != TrialState.RUNNING or trial.params or trial.datetime_start is None:
            return False
        return datetime.now() - trial.datetime_start > timedelta(seconds=self._signs.grace)  # as Optuna sets it

    def _lost(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Optuna calls this for each of them, in one process only."""
        log.warning("the process of trial %d died; its point is tried again", trial.number)
        self._again(trial, more=1)
        if (run_id := trial.user_attrs.get("run_id")) is not None:
            self._mourn(run_id)

    @contextmanager
    def _alive(self, trial: optuna.Trial) -> Iterator[None]:
        """Signs of life until the end. (Optuna's own thread, which `optimize` has, ends with the first one that the
        database does not take.)"""
        identity, ended = trial._trial_id, threading.Event()

        def beat() -> None:
            while not ended.wait(self._signs.every):
                try:
                    self._storage.record_heartbeat(identity)
                except DATABASE_ERRORS as exc:
                    log.warning("no sign of life of trial %d could be given: %s", trial.number, exc)

        self._storage.record_heartbeat(identity)
        thread = threading.Thread(target=beat, name="medloop-search", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


_TOP = 4  # trials at least that stand for the best, and as many for the others


def state_of(trial: FrozenTrial) -> Literal["complete", "pruned", "failed", "running", "waiting"]:
    match trial.state:
        case TrialState.COMPLETE:
            return "complete"
        case TrialState.PRUNED:
            return "pruned"
        case TrialState.FAIL:
            return "failed"
        case TrialState.RUNNING:
            return "running"
        case _:
            return "waiting"


def open_study(
    url: str,
    name: str,
    bound: Bound,
    *,
    start: Point,
    first_look: int,
    make_run: Callable[[], str],
    mourn: Callable[[str], object],
    signs: Signs = Signs(),  # noqa: B008  a tuple of numbers
) -> Study:
    """The study of that name, or a new one whose first trial lies at `start`.

    A trial may be left after `first_look` epochs, and then after `KEPT` times as many. `make_run` gives a new study's
    run, once; `mourn` hears of the run of a trial whose process died.

    Raises Conflict when the study is bound to other things, InvalidRequest for an address that is none, and
    StorageUnavailable.
    """
    storage = open_database(url, signs)
    with database_errors(url):
        study = _enter(storage, name, bound, start, make_run)
        document = _Document.model_validate(study.user_attrs[_BOUND])
    study.sampler = optuna.samplers.TPESampler()
    study.pruner = Halving(first_look)
    return Study(url, study, storage, document, signs, mourn)


def _enter(storage: RDBStorage, name: str, bound: Bound, start: Point, make_run: Callable[[], str]) -> optuna.Study:
    try:
        study = optuna.create_study(storage=storage, study_name=name)
    except DuplicatedStudyError:
        study = optuna.load_study(storage=storage, study_name=name)
        if _bound(study, name, bound):
            return study
        log.warning("whoever began study %s did not come to say what it is about; that is done now", name)
    try:
        document = _Document(bound=bound, run_id=make_run())
        study.set_user_attr(_BOUND, document.model_dump(mode="json"))
    except BaseException:
        optuna.delete_study(storage=storage, study_name=name)  # it has no trials yet
        raise
    study.enqueue_trial(dict(start), user_attrs={"recipe": True})
    return study


def _bound(study: optuna.Study, name: str, bound: Bound) -> bool:
    """Whether the study is bound to `bound`; False when it is bound to nothing, also some time later."""
    end = time.monotonic() + _BEGINNING
    while (found := study.user_attrs.get(_BOUND)) is None:
        if time.monotonic() > end:
            return False
        time.sleep(_PAUSE / 10)
    try:
        differs = bound.differs(_Document.model_validate(found).bound)
    except ValidationError as exc:
        raise Conflict(
            f"Study {name} was made by another version of the trainer; choose another name with --study."
        ) from exc
    if differs is not None:
        raise Conflict(f"Study {name} is of {differs}; choose another name with --study.")
    return True


def _suggest(trial: optuna.Trial, dimension: Between | OneOf) -> Value:
    if isinstance(dimension, OneOf):
        return trial.suggest_categorical(dimension.name, dimension.choices)
    return trial.suggest_float(dimension.name, dimension.low, dimension.high, log=dimension.log)
