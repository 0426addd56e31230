"""A study by itself: its trials are a formula, its processes are real."""

import random
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from medloop.errors import Conflict, InvalidRequest, Preempted, StorageUnavailable, TrainingFailed
from medloop.testing import free_port
from medloop_trainer.attempt import Attempt
from medloop_trainer.database import Signs, open_database
from medloop_trainer.space import Between, point_of
from medloop_trainer.stop import Stop
from medloop_trainer.study import Bound, state_of
from optuna.trial import FrozenTrial

from .searcher import BOUND, EPOCHS, PATIENCE, RECIPE, learn, open_tiny

SEARCHER = Path(__file__).with_name("searcher.py")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'search' / 'phantoms.db'}"


def test_processes_share_one_study_and_take_over_what_a_killed_one_had(url: str, tmp_path: Path) -> None:
    arguments = [["dying", "living", "5", "2"], ["living", "dying", "5", "0"]]
    commands = [[sys.executable, str(SEARCHER), url, str(tmp_path), *names] for names in arguments]
    with ExitStack() as both:
        processes = [both.enter_context(subprocess.Popen(each, stderr=subprocess.PIPE, text=True)) for each in commands]
        for process in processes:
            both.callback(process.kill)
        dying, living = processes
        _, said = dying.communicate(timeout=2 * PATIENCE)
        assert dying.returncode == -signal.SIGKILL, said
        forget(url)
        _, said = living.communicate(timeout=2 * PATIENCE)
        assert living.returncode == 0, said
    study = open_tiny(url, make_run=lambda: pytest.fail("the study has a run"))
    trials = study.trials()
    assert [trial.number for trial in trials] == list(range(6))
    own = [trial for trial in trials if trial.user_attrs.get("recipe")]
    assert [trial.user_attrs.get("retry_of") for trial in own] == [None, 0][: len(own)], "one of them made the study"
    [maker] = tmp_path.glob("made-by-*")
    assert study.run_id == f"parent-of-{maker.name.removeprefix('made-by-')}"

    [lost] = [trial for trial in trials if state_of(trial) == "failed"]
    [again] = [trial for trial in trials if "retry_of" in trial.user_attrs]
    assert (again.user_attrs["retry_of"], again.user_attrs["retries"], again.params) == (lost.number, 1, lost.params)
    assert (tmp_path / "mourned-run-of-dying").exists()
    ended = [trial for trial in trials if trial is not lost]
    assert {state_of(trial) for trial in ended} <= {"complete", "pruned"}
    assert sorted(trial.user_attrs["worker"] for trial in ended) == ["dying", *["living"] * 4]
    assert not study.busy()


def forget(url: str) -> None:
    """Put the last sign of life of the trial whose process died far back."""
    [dead] = [
        trial
        for trial in open_tiny(url).trials()
        if trial.user_attrs.get("run_id") == "run-of-dying" and state_of(trial) == "running"
    ]
    with optuna.storages.RDBStorage(url).engine.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE trial_heartbeats SET heartbeat = '2026-01-01 00:00:00' WHERE trial_id = ?", (dead._trial_id,)
        )


def test_processes_that_make_the_tables_at_once_wait_for_each_other(url: str) -> None:
    """Here the second one comes in before the first one's last step, in which it says what version they are of."""
    came: list[str] = []

    def come_in(_: object, __: object, statement: str, *___: object) -> None:
        if statement.startswith("INSERT INTO alembic_version") and not came:
            came.append(statement)
            open_database(url, Signs())

    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", come_in)
    try:
        open_database(url, Signs())
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "before_cursor_execute", come_in)
    assert came


def test_a_trial_that_was_taken_before_it_began_is_left(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process stood still between asking and setting the point."""

    def take(_: object, study: optuna.Study, trial: FrozenTrial) -> None:
        if trial.number == 0:
            study.tell(0, state=optuna.trial.TrialState.FAIL)

    monkeypatch.setattr(optuna.samplers.TPESampler, "before_trial", take)
    study = open_tiny(url)
    study.work(learn, trials=1, stop=Stop())
    assert study.counts() == {"failed": 1, "complete": 1}


@pytest.mark.parametrize("interruption", [Preempted("SIGTERM in an epoch"), SystemExit(75), KeyboardInterrupt()])
def test_a_trial_that_is_stopped_goes_back(url: str, interruption: BaseException) -> None:
    def stopped(attempt: Attempt) -> float:
        attempt.judge(1, 0.5, last=False)
        raise interruption

    study = open_tiny(url)
    expected = KeyboardInterrupt if isinstance(interruption, KeyboardInterrupt) else Preempted
    with pytest.raises(expected):
        study.work(stopped, trials=1, stop=Stop())
    assert study.counts() == {"failed": 1, "waiting": 1}
    open_tiny(url).work(learn, trials=1, stop=Stop())
    failed, done = study.trials()
    assert (failed.params, state_of(done)) == (done.params, "complete")
    assert done.user_attrs["retries"] == 0, "nothing speaks against the point"


def test_a_trial_that_never_began_holds_nobody_up(url: str) -> None:
    """Its process was killed between asking and its first sign of life."""
    study = open_tiny(url)
    storage = optuna.storages.RDBStorage(url)
    taken = optuna.load_study(study_name="tiny", storage=storage).ask()
    with storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE trials SET datetime_start = '2026-01-01 00:00:00.000000'")
    study.work(learn, trials=1, stop=Stop())
    first, again = study.trials()
    assert (taken.number, state_of(first), state_of(again)) == (0, "failed", "complete")
    assert again.params == point_of(RECIPE)


def test_a_stop_between_trials_begins_no_other(url: str) -> None:
    stop = Stop()

    def last(attempt: Attempt) -> float:
        stop.requested = True
        return learn(attempt)

    study = open_tiny(url)
    with pytest.raises(Preempted, match="the same command goes on"):
        study.work(last, trials=5, stop=stop)
    assert study.counts() == {"complete": 1}


def test_a_mistake_in_a_trial_is_not_tried_again(url: str) -> None:
    def broken(_: Attempt) -> float:
        raise ZeroDivisionError

    study = open_tiny(url)
    with pytest.raises(ZeroDivisionError):
        study.work(broken, trials=1, stop=Stop())
    assert study.counts() == {"failed": 1}
    assert study.trials()[0].user_attrs["reason"] == "ZeroDivisionError"


def test_what_another_process_took_over_is_left_to_it(url: str) -> None:
    def too_long(attempt: Attempt) -> float:
        if attempt.number == 0:
            optuna.load_study(study_name="tiny", storage=url).tell(0, state=optuna.trial.TrialState.FAIL)
        return learn(attempt)

    study = open_tiny(url)
    study.work(too_long, trials=1, stop=Stop())
    assert [state_of(trial) for trial in study.trials()] == ["failed", "complete"]


def test_trials_that_others_are_better_than_are_left_early(url: str) -> None:
    losses = [0.5, 0.9, 0.2, None, 0.4, 0.1, 0.15]

    def trained(attempt: Attempt) -> float:
        loss = losses[attempt.number]
        if loss is None:
            raise TrainingFailed("The loss was no number.")
        return learn(attempt, loss)

    study = open_tiny(url)
    seen: list[int] = []
    study.work(trained, trials=len(losses), stop=Stop(), watch=seen.append)
    assert seen == list(range(8))
    # Looked at after epochs 1 and 3; the last but one epoch of the last trial is that of the third best of four.
    assert [(state_of(trial), trial.last_step) for trial in study.trials()] == [
        *(("complete", EPOCHS), ("pruned", 1), ("complete", EPOCHS), ("pruned", None), ("pruned", 1)),
        *(("complete", EPOCHS), ("pruned", 3)),
    ]
    best = study.best()
    assert best is not None
    assert (best.number, best.value) == (5, 0.1)


def test_importance_tells_what_matters(url: str) -> None:
    study = open_tiny(url)
    assert study.importance() == {}, "too few trials"
    numbers = [each for each in BOUND.space.dimensions if isinstance(each, Between)]
    limits: dict[str, optuna.distributions.BaseDistribution] = {
        each.name: optuna.distributions.FloatDistribution(each.low, each.high) for each in numbers
    }
    draw, opened = random.Random(0), optuna.load_study(study_name="tiny", storage=url)
    for _ in range(30):
        point = {each.name: draw.uniform(each.low, each.high) for each in numbers}
        value = abs(point["label_smoothing"] - 0.1)
        opened.add_trial(optuna.create_trial(params=point, distributions=limits, value=value))
    importance = study.importance()
    assert sum(importance.values()) == pytest.approx(1)
    assert next(iter(importance)) == "label_smoothing"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dataset_id": "e" * 64}, "another data set version"),
        ({"preparation": BOUND.preparation.model_copy(update={"size": 64})}, "prepared in another way"),
        ({"space": BOUND.space.model_copy(update={"version": 0})}, "another space"),
        ({"trial": {"preset": "best"}}, "other options"),
    ],
)
def test_a_study_of_something_else_is_refused(url: str, change: dict[str, object], said: str) -> None:
    open_tiny(url)
    with pytest.raises(Conflict, match=f"Study tiny is of .*{said}.*; choose another name with --study"):
        open_tiny(url, bound=Bound.model_validate(BOUND.model_copy(update=change).model_dump()))


def test_a_study_whose_run_could_not_be_made_leaves_nothing(url: str) -> None:
    def away() -> str:
        raise StorageUnavailable("MLflow is away.")

    with pytest.raises(StorageUnavailable):
        open_tiny(url, make_run=away)
    assert open_tiny(url).run_id == "run"


def test_databases_that_cannot_be_used_are_told_without_their_password(tmp_path: Path) -> None:
    with pytest.raises(StorageUnavailable, match=r"postgresql://127\.0\.0\.1:\d+/s cannot be used \(") as away:
        open_tiny(f"postgresql://me:s3cr{{et@127.0.0.1:{free_port()}/s")
    assert "s3cr" not in away.value.detail
    for address in ("search.db", "mysql://host/search", "sqlite://"):
        with pytest.raises(InvalidRequest, match="MEDLOOP_SEARCH_URL"):
            open_tiny(address)
    (tmp_path / "broken.db").write_text("this is no database, but it is a file that lies in its place")
    with pytest.raises(StorageUnavailable, match=r"broken\.db cannot be used"):
        open_tiny(f"sqlite:///{tmp_path / 'broken.db'}")
