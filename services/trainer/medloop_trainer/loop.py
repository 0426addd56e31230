"""The training loop: from one mark to the next, until all epochs are done, none gets better, or somebody says stop.

A *mark* is a snapshot of everything, taken at steps that depend on nothing but the recipe: at the end of an epoch, and
within a long one every so many steps. Training is taken back to the last mark when its loss is no number any more, and
marks are what is stored as checkpoints, as often as storing keeps up; a stop adds one more checkpoint, of the very
step. So whichever checkpoint a run goes on from, it meets the same marks, and ends with the same weights.
"""

import logging
import math
import time
from collections.abc import Callable
from contextlib import closing

import numpy as np
import torch
from medloop.data.parallel import ProgressFn
from medloop.errors import Preempted, StorageUnavailable, TrainingFailed
from medloop.nets import ServedNetwork
from torch import Tensor

from medloop_trainer.calibrate import find_temperature
from medloop_trainer.checkpoint import Snapshot
from medloop_trainer.device import Device
from medloop_trainer.images import Feed, Images
from medloop_trainer.learner import Learner, logits_of, plain_copy, under
from medloop_trainer.randomness import seed_step
from medloop_trainer.ranks import ALONE, Ranks
from medloop_trainer.recipe import Recipe
from medloop_trainer.sampler import Sampler
from medloop_trainer.saver import Saver
from medloop_trainer.schedule import one_cycle
from medloop_trainer.scores import score
from medloop_trainer.state import Epoch, Fit, State
from medloop_trainer.stop import Stop

__all__ = ["CHECKPOINT_STEPS", "Epoch", "Fit", "Images", "fit", "logits_of"]

log = logging.getLogger(__name__)

CHECKPOINT_STEPS = 50
LOWERED = 0.25
"""What is left of the learning rate after the loss was no number: a rate that is too high is so by a factor."""
_SHORTEST_WAY = 10  # steps between marks, however short an epoch is: copying everything takes a part of a small step
_LOOKED_AT = 10  # steps between looks at the losses on a GPU, each of which waits for it


class _Diverged(Exception):
    """The loss, or a gradient, is no number any more."""


def fit(
    network: ServedNetwork,
    images: Images,
    recipe: Recipe,
    device: Device,
    *,
    ranks: Ranks = ALONE,
    start: tuple[Snapshot, Snapshot] | None = None,
    saver: Saver | None = None,
    stop: Stop | None = None,
    checkpoint_steps: int = CHECKPOINT_STEPS,
    compiled: bool = False,
    report: Callable[[Epoch], None] | None = None,
    progress: ProgressFn | None = None,
) -> Fit:
    """Train `network` in place; it ends with the weights of the epoch that the validation split liked best.

    `start` is where to go on from and the mark before it. `report` is called after each epoch, again for one that had
    to be done again.

    Several `ranks` train together, each calling this with the same images and recipe. All begin with the leader's
    network or `start`, decide together, and end with the same weights; the leader alone needs a `saver`.

    Raises:
        InvalidRequest: there are too few images for so many ranks.
        Unavailable: another rank is gone.
        TrainingFailed: the loss was no number, twice, or the GPU's memory is not enough.
        Preempted: `stop` was requested; the last step done is stored.
    """
    sampler = Sampler(images.labels[images.train], recipe, images.train_shards)
    ranks.check(len(images.train) // sampler.batches)
    learner = Learner(network, recipe, device, sampler.shares, compiled=compiled, ranks=ranks)
    stop = stop or Stop()
    loop = _Loop(learner, sampler, images, recipe, device, ranks, saver, stop, checkpoint_steps, report, progress)
    return loop.run(start)


class _Loop:
    def __init__(
        self,
        learner: Learner,
        sampler: Sampler,
        images: Images,
        recipe: Recipe,
        device: Device,
        ranks: Ranks,
        saver: Saver | None,
        stop: Stop,
        checkpoint_steps: int,
        report: Callable[[Epoch], None] | None,
        progress: ProgressFn | None,
    ) -> None:
        self._learner, self._sampler, self._images, self._recipe = learner, sampler, images, recipe
        self._device, self._saver, self._stop, self._checkpoint_steps = device, saver, stop, checkpoint_steps
        self._report, self._progress, self._ranks = report, progress, ranks
        self._feed = Feed(images, sampler, recipe.steps, ranks, self._between)
        self._state = State()
        self._best: dict[str, Tensor] = {}
        self._losses: list[Tensor] = []  # not looked at yet

    def run(self, start: tuple[Snapshot, Snapshot] | None) -> Fit:
        with self._stop.deferred(), closing(self._feed):
            if start is None:
                self._set_mark()
            else:
                self._restore(start[0])
                self._mark = start[1]
            self._begin_together()
            while not self._state.finished:
                try:
                    self._one_epoch()
                except _Diverged:
                    self._take_back()
                except StorageUnavailable as exc:  # what is streamed; checkpoints wait for no storage
                    raise self._resumable(exc) from exc
        state, network = self._state, self._learner.network
        network.load_state_dict(self._best)
        return Fit(tuple(state.epochs), state.best_epoch, self._sampler.shown(state.step) / max(state.busy, 1e-9))

    def _begin_together(self) -> None:
        """Every rank stands where the leader does."""
        if self._ranks.world > 1:
            mark, here = self._ranks.leaders_snapshot(self._mark), self._ranks.leaders_snapshot(self._snapshot())
            if not self._ranks.leads:
                self._restore(here)
                self._mark = mark

    def _one_epoch(self) -> None:
        """What is left of the present epoch: its steps, its judgement, its mark."""
        state, end = self._state, (len(self._state.epochs) + 1) * self._recipe.steps_per_epoch
        while state.step < end:
            self._one_step()
            if state.step < end and state.step - state.marked >= self._checkpoint_steps:
                self._set_mark()  # before leaving: a stop moves no mark
            self._leave_if_asked()
        self._look_at_losses()
        self._judge()
        if state.finished or state.step - state.marked >= min(_SHORTEST_WAY, self._checkpoint_steps):
            self._set_mark()
        if not state.finished:
            self._leave_if_asked()

    def _one_step(self) -> None:
        state, recipe = self._state, self._recipe
        started = time.perf_counter()
        pixels, labels = self._feed.at(state.step)
        waited = time.perf_counter() - started
        seed_step(recipe.seed, state.step, self._ranks.rank)
        mix = len(state.epochs) < recipe.cutmix_epochs()
        weight = len(labels) / (self._sampler.shown(state.step + 1) - self._sampler.shown(state.step))
        rate = self._rate(state.step)
        self._losses.append(self._learner.step(state.step, pixels, labels, rate, mix=mix, weight=weight))
        state.step += 1
        if self._device.name == "cpu" or len(self._losses) >= _LOOKED_AT:
            self._look_at_losses()
        state.waited += waited
        state.seconds += time.perf_counter() - started
        if self._progress:
            self._progress("training", self._sampler.shown(state.step), self._sampler.shown(recipe.steps))

    def _rate(self, step: int) -> float:
        peak = self._recipe.learning_rate * (LOWERED if self._state.lowered else 1.0)
        return peak * one_cycle(step / self._recipe.steps, self._recipe.warm_up)

    def _look_at_losses(self) -> None:
        for loss in torch.stack(self._losses).tolist() if self._losses else ():
            if not math.isfinite(loss):
                raise _Diverged
            self._state.loss_sum += loss
            self._state.loss_count += 1
        self._losses.clear()

    def _judge(self) -> None:
        state, images, network = self._state, self._images, self._learner.judged
        truth = images.labels[images.val]
        rows = self._ranks.share(images.val)
        logits = logits_of(network, images.pixels, self._device, rows=rows, between=self._between)
        logits = self._ranks.gathered(logits, len(truth))
        if not np.isfinite(logits).all():
            raise _Diverged
        shown = self._sampler.shown(state.step) - self._sampler.shown(state.step - self._recipe.steps_per_epoch)
        epoch = Epoch(
            number=len(state.epochs) + 1,
            train_loss=state.loss_sum / state.loss_count,
            val=score(logits, truth),
            judged_by=self._ranks.leaders(score(logits / find_temperature(logits, truth), truth).loss),
            learning_rate=self._rate(state.step - 1),
            images_per_second=shown / state.seconds,
            input_wait_share=state.waited / state.seconds,
        )
        self._enter(epoch)
        if self._report:
            self._report(epoch)

    def _enter(self, epoch: Epoch) -> None:
        """Make a judged epoch part of the state, and decide whether it was the last."""
        state, recipe = self._state, self._recipe
        state.epochs.append(epoch)
        state.busy += state.seconds
        state.seconds = state.waited = state.loss_sum = 0.0
        state.loss_count = 0
        if state.best is None or epoch.judged_by < state.best_epoch.judged_by:
            state.best = epoch.number
            self._best = {name: plain_copy(value) for name, value in self._learner.judged.state_dict().items()}
        lagging = epoch.number - state.best
        state.finished = epoch.number == recipe.epochs or 0 < recipe.patience <= lagging
        if state.finished and epoch.number < recipe.epochs:
            log.info("training ends early: no epoch was better for %d", lagging)

    def _snapshot(self) -> Snapshot:
        tensors = self._learner.tensors()
        tensors |= {f"best.{name}": value for name, value in self._best.items()}  # never changed, so not copied
        return Snapshot(self._state.model_copy(deep=True), tensors)

    def _set_mark(self) -> None:
        self._look_at_losses()
        self._state.marked = self._state.step
        self._mark = self._snapshot()
        if self._saver:
            self._saver.offer(self._mark)

    def _restore(self, snapshot: Snapshot) -> None:
        self._learner.restore(snapshot.tensors)
        self._best = under("best", snapshot.tensors)
        self._state = snapshot.state.model_copy(deep=True)
        self._losses.clear()

    def _take_back(self) -> None:
        """To the last mark, with a lower learning rate; the second time it is no use."""
        state, rate = self._state, self._recipe.learning_rate
        if state.lowered:
            raise TrainingFailed(
                f"The loss was no number any more in epoch {len(state.epochs) + 1}, also after the learning rate was "
                f"lowered; choose a smaller --learning-rate than {rate * LOWERED:g}."
            )
        log.warning(
            "the loss is no number after step %d; training goes back to step %d with a quarter of the learning rate",
            state.step,
            state.marked,
        )
        self._restore(self._mark)
        self._state.lowered = True

    def _resumable(self, exc: StorageUnavailable) -> StorageUnavailable:
        run = None if self._saver is None else self._saver.checkpoints.about.run_id
        further = "" if run is None else f" Then go on from the last checkpoint with --resume {run}."
        return StorageUnavailable(exc.detail + further)

    def _between(self) -> None:
        """Within a step or a judgement one process may leave; several leave after the same step."""
        if self._ranks.world == 1:
            self._leave_if_asked()

    def _leave_if_asked(self) -> None:
        if self._ranks.any(self._stop.requested):
            self._leave()

    def _leave(self) -> None:
        """Store where training stands, and the mark before it, and raise Preempted, all ranks together."""
        self._look_at_losses()
        state, steps = self._state, self._recipe.steps
        if self._saver is None:
            self._ranks.wait()
            raise Preempted(f"Training was stopped after step {state.step} of {steps}.")
        here = self._mark if state.step == state.marked else self._snapshot()
        stored = self._saver.flush(self._mark, here) if here is not self._mark else self._saver.flush(here)
        run_id = self._saver.checkpoints.about.run_id
        self._ranks.wait()
        if stored:
            raise Preempted(f"Training was stopped after step {state.step} of {steps}; go on with --resume {run_id}.")
        raise Preempted(
            f"Training was stopped after step {state.step} of {steps}, but its checkpoint could not be stored; "
            f"--resume {run_id} goes on from the one before, if there is one."
        )
