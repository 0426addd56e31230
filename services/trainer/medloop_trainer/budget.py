"""`--budget-minutes`: measured once, before the first step; from then on the number of steps holds, not the clock."""

import copy
import time
from dataclasses import dataclass
from statistics import median

from medloop.nets import ServedNetwork

from medloop_trainer.device import Device
from medloop_trainer.images import Feed, Images
from medloop_trainer.learner import Learner, logits_of
from medloop_trainer.randomness import seed_step
from medloop_trainer.ranks import ALONE, Ranks
from medloop_trainer.recipe import Recipe
from medloop_trainer.sampler import Sampler

_MARGIN = 0.95  # of the budget is planned: machines have slower minutes
_WARM_UP = 2  # steps that allocate and compile
_STEPS, _SECONDS = 10, 5.0  # of measuring: as many steps, or as long, but two at least
_SCORED = 1024  # validation images


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds that a step takes, that a look at the whole validation split takes, and that finding out took."""

    step: float
    validation: float
    spent: float


def measure(
    network: ServedNetwork,
    images: Images,
    recipe: Recipe,
    device: Device,
    *,
    compiled: bool,
    ranks: Ranks = ALONE,
) -> Pace:
    """Train and judge a copy of `network` for some seconds, all `ranks` together."""
    started = time.perf_counter()
    sampler = Sampler(images.labels[images.train], recipe, images.train_shards)
    ranks.check(len(images.train) // sampler.batches)
    feed = Feed(images, sampler, 1 + _WARM_UP + _STEPS, ranks)
    feed.at(0)
    # What is streamed is read a window at a time beside the steps, and the slower of both sets the pace.
    reading = (time.perf_counter() - started) * recipe.batch_size * sampler.windows / len(images.train)
    learner = Learner(copy.deepcopy(network), recipe, device, sampler.shares, compiled=compiled, ranks=ranks)
    times: list[float] = []
    while ranks.any(len(times) < _WARM_UP + 2 or (len(times) < _WARM_UP + _STEPS and sum(times[_WARM_UP:]) < _SECONDS)):
        begun = time.perf_counter()
        seed_step(recipe.seed, len(times))
        # As a number, which waits for the device.
        float(learner.step(len(times), *feed.at(1 + len(times)), recipe.learning_rate, mix=True))
        times.append(time.perf_counter() - begun)
    feed.close()
    scored = images.val[:_SCORED]
    part = ranks.share(scored)
    begun = time.perf_counter()
    logits_of(learner.judged, images.pixels, device, rows=part)
    validation = (time.perf_counter() - begun) * len(images.val) / len(scored)
    return Pace(max(reading, median(times[_WARM_UP:])), validation, time.perf_counter() - started)


def most_steps(minutes: float, pace: Pace, steps_per_epoch: int) -> int:
    """How many steps fit into `minutes` with a look at the validation split after each epoch: whole epochs, or, of
    less than one, what is left beside one look. At least 1."""
    seconds = _MARGIN * 60 * minutes - pace.spent
    epochs = int(seconds / (steps_per_epoch * pace.step + pace.validation))
    if epochs >= 1:
        return epochs * steps_per_epoch
    return max(1, min(steps_per_epoch, int((seconds - pace.validation) / pace.step)))
