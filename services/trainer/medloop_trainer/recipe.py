"""How a network is trained: what a person may ask for, and the recipe that is settled from it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple, Self

import numpy as np
from medloop.errors import InvalidRequest
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medloop_trainer.modality import Looks, Modality, Moves, choose_moves

DEFAULT_SIZE = 64
"""px. Larger images are prepared at this side unless asked otherwise, since a CPU trains them many times faster
than at 224; smaller ones at their own, since enlarging adds nothing."""
SMALLEST_SIZE = 28
LARGEST_SMALL = 96
"""px up to which the small network is chosen; beyond it, its eight-fold stem would throw detail away."""

TAG_PARENT_VERSION = "medloop.parent_version"
"""Of a run and of a registered version: the version of the same model whose weights it started from."""

Preset = Literal["quick", "standard", "best"]
Sampling = Literal["natural", "sqrt", "balanced"]


class Options(BaseModel):
    """What was asked for; None leaves the choice to `Recipe.settle`. `pretrained` is `auto`, `none` or a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: Preset = "standard"
    """How many images are shown, and nothing else: see `choose_epochs`."""
    budget_minutes: float | None = Field(default=None, gt=0, le=10_080)
    """The longest that training may take. The caller measures a step once and settles the recipe with `most_steps`,
    which is what the recipe keeps: minutes on another day would be another number of steps."""
    architecture: str = "auto"
    size: int | None = Field(default=None, ge=16, le=512)
    epochs: int | None = Field(default=None, ge=1, le=10_000)
    batch_size: int = Field(default=64, ge=2, le=4096)
    learning_rate: float | None = Field(default=None, gt=0, le=10)
    warm_up: float = Field(default=0.25, ge=0, le=0.9)
    weight_decay: float = Field(default=0.05, ge=0, le=10)
    ema_decay: float | None = Field(default=None, ge=0, lt=1)
    patience: int | None = Field(default=None, ge=0, le=10_000)
    label_smoothing: float = Field(default=0.05, ge=0, lt=1)
    sampling: Sampling = "sqrt"
    logit_adjustment: float = Field(default=0.0, ge=0, le=5)
    correction_weight: int | None = Field(default=None, ge=1, le=100)
    modality: Modality = "auto"
    horizontal_flip: bool | None = None
    """What the modality says, unless it is known better: left and right differ in a body, but not in a hand."""
    erase_probability: float = Field(default=0.0, ge=0, le=1)
    cutmix_alpha: float = Field(default=1.0, gt=0, le=100)
    cutmix_probability: float = Field(default=0.5, ge=0, le=1)
    mixup_alpha: float = Field(default=0.2, gt=0, le=100)
    mixup_probability: float = Field(default=0.0, ge=0, le=1)
    whole_share: float = Field(default=0.15, ge=0, le=1)
    pretrained: str = "auto"
    seed: int = Field(default=0, ge=0, lt=2**32)

    @classmethod
    def checked(cls, **values: object) -> Self:
        """Raises InvalidRequest naming the option that is out of its range."""
        try:
            options = cls.model_validate(values)
        except ValidationError as exc:
            fault = exc.errors()[0]
            option = "--" + str(fault["loc"][0]).replace("_", "-")
            raise InvalidRequest(f"{option} {fault['input']} cannot be used: {fault['msg'].lower()}.") from exc
        if options.cutmix_probability + options.mixup_probability > 1:
            raise InvalidRequest(
                "--cutmix-probability and --mixup-probability add up to more than 1; a batch is mixed in one way."
            )
        return options

    @property
    def weights(self) -> str | Path | None:
        """`pretrained` as `medloop.nets.build` takes it."""
        if self.pretrained == "none":
            return None
        return self.pretrained if self.pretrained == "auto" else Path(self.pretrained)

    def choose_size(self, largest_side: int) -> int:
        """S in px for images whose longer side is at most `largest_side` px."""
        return self.size or max(SMALLEST_SIZE, min(DEFAULT_SIZE, largest_side))

    def choose_architecture(self, size: int) -> str:
        if self.architecture != "auto":
            return self.architecture
        return "small-resnet" if size <= LARGEST_SMALL else "resnet18"


class ParentVersion(BaseModel):
    """The registered version whose weights a retraining starts from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    version: str
    run_id: str
    bundle_digest: str

    def tags(self) -> dict[str, str]:
        """What its child's run is tagged with in MLflow."""
        return {
            TAG_PARENT_VERSION: self.version,
            "medloop.parent_run_id": self.run_id,
            "medloop.parent_bundle_digest": self.bundle_digest,
        }


class Recipe(BaseModel):
    """Every number that training depends on: the same recipe, data and machine give the same weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[2] = 2
    architecture: str
    size: int
    epochs: int
    """At most, and each ends with a look at the validation split."""
    steps_per_epoch: int
    batch_size: int
    """Over all devices together."""
    learning_rate: float
    """The peak of the cycle."""
    warm_up: float
    """The share of all steps in which the learning rate rises, linearly, before half a cosine brings it down."""
    weight_decay: float
    ema_decay: float
    """Share of itself that the moving average of the weights (and of the norms' statistics) keeps at each step, which
    is what validation judges and the bundle gets; 0 for the weights as they are. While the average is young,
    `ema_decay_at` lets it follow faster."""
    patience: int
    """Epochs without a better one after which training ends early; 0 for never."""
    label_smoothing: float
    sampling: Sampling
    """How often an image is shown: all alike, by its class's frequency to the power −1/2 (Mahajan et al. 2018), half
    way to equal shares, or so that classes have equal shares. With classes of one size they are the same."""
    logit_adjustment: float
    """τ of Menon et al. 2021: training adds τ·log π_k to the logits, π being the shares that classes are shown with
    (`shown_shares`); what is served goes without, and so is fair to rare classes. 0 for none."""
    correction_weight: int = 1
    """How many times as often as another training image one that a person corrected is shown."""
    modality: Modality
    moves: Moves
    cutmix_alpha: float
    cutmix_probability: float
    """Of a batch being mixed by CutMix."""
    mixup_alpha: float
    mixup_probability: float
    """Of a batch being mixed by MixUp instead; both together are 1 at most."""
    whole_share: float
    """The last share of epochs see images whole, as they will be served; one epoch at least unless 0."""
    pretrained: str | None
    """Where the weights came from, None for random ones and for those of `parent`."""
    parent: ParentVersion | None = None
    """Of a retraining: the version it goes on from, head and normalisation included."""
    seed: int

    @classmethod
    def settle(
        cls,
        options: Options,
        *,
        architecture: str,
        size: int,
        images: int,
        pretrained: str | None,
        parent: ParentVersion | None = None,
        looks: Looks = Looks(),  # noqa: B008  a tuple of numbers
        most_steps: int | None = None,
    ) -> Self:
        """Fill in what `options` leaves open, for `images` training images that look like `looks`, each counted as
        often as it is shown.

        `most_steps` is what a budget allows: fewer epochs then, and of less than one epoch a shorter one.
        """
        epochs = options.epochs or choose_epochs(images, options.preset, retraining=parent is not None)
        steps_per_epoch = max(1, images // options.batch_size)
        if most_steps is not None:
            epochs = max(1, min(epochs, most_steps // steps_per_epoch))
            steps_per_epoch = max(1, min(steps_per_epoch, most_steps))
        moves = choose_moves(options.modality, looks).model_copy(
            update={"erase_probability": options.erase_probability}
            | ({} if options.horizontal_flip is None else {"horizontal_flip": options.horizontal_flip})
        )
        settled = {
            "epochs": epochs,
            "steps_per_epoch": steps_per_epoch,
            "learning_rate": options.learning_rate or choose_rate(architecture, pretrained, parent),
            "ema_decay": choose_ema(epochs * steps_per_epoch) if options.ema_decay is None else options.ema_decay,
            "patience": choose_patience(epochs) if options.patience is None else options.patience,
            "moves": moves,
            "architecture": architecture,
            "size": size,
            "pretrained": pretrained,
            "parent": parent,
            "correction_weight": choose_correction_weight(options, parent),
        }
        kept = options.model_dump(include=cls.model_fields.keys() - settled.keys())
        return cls(**kept, **settled)

    @classmethod
    def read(cls, document: str | bytes) -> Self:
        """The recipe of a run, as its `recipe.json` has it.

        Raises InvalidRequest when it was written by a trainer that could do other things than this one.
        """
        try:
            return cls.model_validate_json(document)
        except ValidationError as exc:
            raise InvalidRequest(
                "The run's recipe was written by another version of the trainer; train again with this one, "
                "or install that one (the run's tags name its commit)."
            ) from exc

    @property
    def steps(self) -> int:
        """Of the whole training, unless it ends early; the learning rate's cycle is as long."""
        return self.epochs * self.steps_per_epoch

    def cutmix_epochs(self) -> int:
        """The first so many epochs mix images."""
        return self.epochs - math.ceil(round(self.whole_share * self.epochs, 6))

    def ema_decay_at(self, step: int) -> float:
        """The average's decay at `step`, counted from 0: an average of few is a plain mean."""
        return min(self.ema_decay, (1 + step) / (10 + step))

    def shown_shares(self, counts: Sequence[int]) -> NDArray[np.float64]:
        """Shares [K], adding up to 1, that classes of `counts` training images are shown with."""
        power = {"natural": 1.0, "sqrt": 0.5, "balanced": 0.0}[self.sampling]
        weights = np.where(np.asarray(counts) > 0, np.power(np.maximum(1, counts), power), 0.0)
        return np.asarray(weights / weights.sum())


class _Shown(NamedTuple):
    images: int
    least: int
    most: int


_SHOWN: Final[dict[Preset, _Shown]] = {
    "quick": _Shown(10_000, 5, 60),
    "standard": _Shown(40_000, 10, 120),
    "best": _Shown(200_000, 20, 300),
}


def choose_epochs(images: int, preset: Preset = "standard", *, retraining: bool = False) -> int:
    """Epochs for so many training images: a few, and as many more as show a number of images, at most so many. A
    third of them when retraining: most of what there is to learn is known.

    Small sets need many passes, large ones few. 8,400 images take 6 epochs in `quick`, 15 in `standard`, 44 in `best`;
    550 take 23, 83 and 300.
    """
    shown = _SHOWN[preset]
    epochs = min(shown.most, round(shown.least + shown.images / max(1, images)))
    return -(-epochs // 3) if retraining else epochs


def choose_rate(architecture: str, pretrained: str | None, parent: ParentVersion | None) -> float:
    """The peak of the cycle. Weights that know something are to be tuned, not overwritten: a tenth of the rate for
    random ones. A torchvision network has perhaps been tuned at that before: a third of it when it is retrained."""
    if parent is not None:
        return 3e-4 if architecture == "small-resnet" else 1e-4
    return 3e-4 if pretrained else 3e-3


def choose_correction_weight(options: Options, parent: ParentVersion | None) -> int:
    """When retraining, 4: what the champion got wrong is rare among what it got right, and is the reason to retrain."""
    return options.correction_weight or (1 if parent is None else 4)


def choose_ema(steps: int) -> float:
    """A moving average over the last thirtieth of `steps`, at least 10: long enough to be smooth, short enough to have
    forgotten the time of large learning rates when the cycle ends."""
    return round(1 - 1 / max(10, steps / 30), 6)


def choose_patience(epochs: int) -> int:
    """Two fifths of `epochs`, at least 5: the learning rate's fall makes weights better late, and a small validation
    split is noisy, so only a network that has clearly begun to learn by heart is stopped."""
    return max(5, round(0.4 * epochs))
