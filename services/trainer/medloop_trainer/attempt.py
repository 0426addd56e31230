"""A trial while it is trained, and when it is left."""

from collections.abc import Iterator
from contextlib import contextmanager

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial, TrialState
from pydantic import JsonValue

from medloop_trainer.space import Point

KEPT = 3
"""One in so many goes on after each look."""


class Pruned(Exception):
    """The trial is not worth going on with."""


class Taken(Exception):
    """Another process tries this point again, since no signs of life arrived from here."""


class Halving(BasePruner):
    """Asynchronous successive halving (Li et al. 2020). Optuna's own also counts trials that failed, and so would have
    a point that is tried again compete with itself."""

    def __init__(self, first_look: int) -> None:
        self._look = first_look

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        step, look = trial.last_step, self._look
        while step is not None and look < step:
            look *= KEPT
        if step is None or step != look:
            return False
        others = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING))
        values = sorted(other.intermediate_values[step] for other in others if step in other.intermediate_values)
        return trial.intermediate_values[step] > values[max(1, len(values) // KEPT) - 1]


class Attempt:
    """One trial that is being trained, at `point`."""

    def __init__(self, trial: optuna.Trial, point: Point) -> None:
        self.number, self.point = trial.number, point
        self._trial, self._looked = trial, 0

    def judge(self, epoch: int, value: float, *, last: bool) -> None:
        """Tell how good the best epoch up to `epoch` is (less is better); raises Pruned when others were better."""
        if epoch <= self._looked:
            return  # it had to be trained again
        self._looked = epoch
        with still_ours(self.number):
            self._trial.report(value, epoch)
            # Nothing is saved by leaving when all is done.
            if not last and self._trial.should_prune():
                raise Pruned(f"after epoch {epoch} it was not among the best third")

    def note(self, **facts: JsonValue) -> None:
        """Keep facts beside the trial."""
        with still_ours(self.number):
            for name, fact in facts.items():
                self._trial.set_user_attr(name, fact)


@contextmanager
def still_ours(number: int) -> Iterator[None]:
    """Raises Taken where another process has ended the trial."""
    try:
        yield
    except UpdateFinishedTrialError as exc:
        raise Taken(f"trial {number}") from exc
