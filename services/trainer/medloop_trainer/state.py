"""Where a training stands, but for its tensors."""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from medloop_trainer.scores import Scores


@dataclass(frozen=True, slots=True)
class Epoch:
    """`number` counts from 1; `train_loss` is the mean cross-entropy against smoothed and mixed targets.

    `judged_by` is the validation loss at its own best temperature: mixed and smoothed targets make a network timid,
    which calibration undoes later, so how sure it is must not decide which epoch is best. `input_wait_share` is the
    share of training time that went by waiting for images, in [0, 1].
    """

    number: int
    train_loss: float
    val: Scores
    judged_by: float
    learning_rate: float
    images_per_second: float
    input_wait_share: float = 0.0


class State(BaseModel):
    """Together with the weights, the average, the optimizer and the recipe, all that the next step depends on.

    `seconds`, `waited` and `busy` are times (s) and decide nothing.
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    step: int = 0
    """Steps done."""
    epochs: list[Epoch] = []
    """Those that were judged. One that is not yet may have all its steps done."""
    best: int | None = None
    """The number of the best epoch so far, whose weights are kept."""
    marked: int = 0
    """The step that training would be taken back to if its loss were no number now."""
    lowered: bool = False
    """It was taken back once, and goes on with a lower learning rate."""
    finished: bool = False
    loss_sum: float = 0.0
    """Of the losses of the present epoch."""
    loss_count: int = 0
    seconds: float = 0.0
    """Of training in the present epoch; `waited` of them for images."""
    waited: float = 0.0
    busy: float = 0.0
    """Of training in all epochs before."""

    @property
    def best_epoch(self) -> Epoch:
        if self.best is None:
            raise ValueError("no epoch was judged yet")
        return self.epochs[self.best - 1]


@dataclass(frozen=True, slots=True)
class Fit:
    """`images_per_second` counts forward and backward passes with loading and augmentation, not validation."""

    epochs: tuple[Epoch, ...]
    best: Epoch
    images_per_second: float
