"""What a search may change of the recipe, as data: few dimensions, since every one more costs trials.

Searched is what decides how well a network generalises and has no good value of its own for every data set: the peak
of the learning rate and what it trades against (batch size, warm-up, weight decay), how soft targets are (label
smoothing), how often and how images are mixed, and whether weights are averaged. Not searched is
- what a person must know: modality, flips, whether rare classes matter more (`sampling`, `logit_adjustment`: the
  validation loss would always vote for the classes that are frequent);
- what would make trials incomparable: size, architecture, how many images are shown;
- what hardly matters beside these: the length of the average, MixUp's α, erasing.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from medloop_trainer.recipe import Recipe

SPACE_VERSION = 1
"""Counts up when a dimension changes its meaning; trials of different versions cannot be compared."""

Value = bool | int | float
Point = Mapping[str, Value]
"""A value for every dimension, by name."""

FIRST_LOOK = 0.3
"""The share of epochs after which a trial may be left: the learning rate has stopped rising everywhere by then, and
early ranks say more."""

_BATCHES = (16, 32, 64, 128, 256)
_FEWEST_STEPS = 8
"""An epoch of fewer steps than this judges a batch size by the number of steps more than by anything else."""


class Between(BaseModel):
    """A number in [low, high], drawn evenly from it or from its logarithm."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["between"] = "between"
    name: str
    low: float
    high: float
    log: bool = False


class OneOf(BaseModel):
    """One of some values."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["one-of"] = "one-of"
    name: str
    choices: tuple[Value, ...]


class Space(BaseModel):
    """All dimensions of a search."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = SPACE_VERSION
    dimensions: tuple[Annotated[Between | OneOf, Field(discriminator="kind")], ...]

    @classmethod
    def around(cls, recipe: Recipe, images: int) -> "Space":
        """The space around what the recipe has of its own for `images` training images."""
        # Pretrained weights want a tenth of the rate that random ones want, which the recipe knows.
        rate = recipe.learning_rate
        batches = {size for size in _BATCHES if size * _FEWEST_STEPS <= images} | {recipe.batch_size}
        return cls(
            dimensions=(
                Between(name="learning_rate", low=rate / 10, high=rate * 6, log=True),
                Between(name="warm_up", low=0.05, high=FIRST_LOOK),
                Between(name="weight_decay", low=0.001, high=0.5, log=True),
                OneOf(name="batch_size", choices=tuple(sorted(batches))),
                Between(name="label_smoothing", low=0.0, high=0.2),
                # How often batches are mixed at all, and how many of these by MixUp: two independent numbers, where
                # the probabilities of both are bound to each other.
                Between(name="mix_probability", low=0.0, high=1.0),
                Between(name="mixup_share", low=0.0, high=1.0),
                Between(name="cutmix_alpha", low=0.25, high=4.0, log=True),  # as far as Yun et al. 2019 looked
                OneOf(name="average", choices=(True, False)),
            )
        )


def point_of(recipe: Recipe) -> dict[str, Value]:
    """Where the recipe itself lies: the first trial, which all others have to beat."""
    mix = recipe.cutmix_probability + recipe.mixup_probability
    return {
        "learning_rate": recipe.learning_rate,
        "warm_up": recipe.warm_up,
        "weight_decay": recipe.weight_decay,
        "batch_size": recipe.batch_size,
        "label_smoothing": recipe.label_smoothing,
        "mix_probability": mix,
        "mixup_share": recipe.mixup_probability / mix if mix else 0.0,
        "cutmix_alpha": recipe.cutmix_alpha,
        "average": recipe.ema_decay > 0,
    }


def options_at(point: Point) -> dict[str, Value]:
    """The fields of `Options` that stand for `point`, with as many digits as a person would type.

    A trial trains with these very values, so that typing them trains the same.
    """
    mix = round(point["mix_probability"], 3)
    mixup = round(mix * point["mixup_share"], 3)
    options: dict[str, Value] = {
        name: _short(point[name])
        for name in ("learning_rate", "warm_up", "weight_decay", "batch_size", "label_smoothing", "cutmix_alpha")
    }
    options |= {"cutmix_probability": round(mix - mixup, 3), "mixup_probability": mixup}
    # The average's length follows the number of steps, which differs between a trial and a training.
    return options if point["average"] else {**options, "ema_decay": 0}


SEARCHED = (
    *("learning_rate", "warm_up", "weight_decay", "batch_size", "label_smoothing", "ema_decay"),
    *("cutmix_alpha", "cutmix_probability", "mixup_probability"),
)
"""The fields of `Options` that `options_at` may give."""


def _short(value: Value) -> Value:
    return float(f"{value:.3g}") if isinstance(value, float) else value


def flags(options: Mapping[str, object]) -> list[str]:
    """`options` as arguments of the trainer's command line."""
    found: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found += [f"--{flag}", f"{value:g}" if isinstance(value, float) else str(value)]
    return found
