"""How a network is trained: what a person may ask for, and the recipe that is settled from it."""

from pathlib import Path
from typing import Self

from medloop.errors import InvalidRequest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

DEFAULT_SIZE = 64
"""px. Larger images are prepared at this side unless asked otherwise, since a CPU trains them sixteen times faster
than at 224; smaller ones at their own, since enlarging adds nothing."""
SMALLEST_SIZE = 28
LARGEST_SMALL = 96
"""px up to which the small network is chosen; beyond it, its eight-fold stem would throw detail away."""


class Options(BaseModel):
    """What was asked for; None leaves the choice to `Recipe.settle`. `pretrained` is `auto`, `none` or a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str = "auto"
    size: int | None = Field(default=None, ge=16, le=512)
    epochs: int | None = Field(default=None, ge=1, le=10_000)
    batch_size: int = Field(default=64, ge=2, le=4096)
    learning_rate: float | None = Field(default=None, gt=0, le=10)
    weight_decay: float = Field(default=0.05, ge=0, le=10)
    label_smoothing: float = Field(default=0.05, ge=0, lt=1)
    cutmix_alpha: float = Field(default=1.0, gt=0, le=100)
    cutmix_probability: float = Field(default=0.5, ge=0, le=1)
    horizontal_flip: bool = False
    """Off, since left and right differ in a body; right for histology and cells."""
    pretrained: str = "auto"
    seed: int = Field(default=0, ge=0, lt=2**32)

    @classmethod
    def checked(cls, **values: object) -> Self:
        """Raises InvalidRequest naming the option that is out of its range."""
        try:
            return cls.model_validate(values)
        except ValidationError as exc:
            fault = exc.errors()[0]
            option = "--" + str(fault["loc"][0]).replace("_", "-")
            raise InvalidRequest(f"{option} {fault['input']} cannot be used: {fault['msg'].lower()}.") from exc

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


class Recipe(BaseModel):
    """Every number that training depends on: the same recipe, data and machine give the same weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    size: int
    epochs: int
    batch_size: int
    learning_rate: float
    """The peak of the cycle."""
    weight_decay: float
    label_smoothing: float
    cutmix_alpha: float
    cutmix_probability: float
    horizontal_flip: bool
    pretrained: str | None
    """Where the weights came from, None for random ones."""
    seed: int

    @classmethod
    def settle(cls, options: Options, *, architecture: str, size: int, images: int, pretrained: str | None) -> Self:
        """Fill in what `options` leaves open, for `images` training images."""
        given = options.model_dump(exclude={"architecture", "size", "pretrained"}, exclude_none=True)
        # Pretrained weights are to be tuned, not overwritten.
        found = {"epochs": choose_epochs(images), "learning_rate": 3e-4 if pretrained else 3e-3}
        return cls(architecture=architecture, size=size, pretrained=pretrained, **{**found, **given})

    def cutmix_epochs(self) -> int:
        """The first so many epochs mix images; the last 15 %, one at least, see them whole, as they will be served."""
        return self.epochs - max(1, round(0.15 * self.epochs))


def choose_epochs(images: int) -> int:
    """Epochs for so many training images: 5, and as many more as show 10,000 images, at most 60.

    Small sets need many passes, large ones few: 23 for 550 images, 11 for 1,700, 6 for 8,400.
    """
    return min(60, round(5 + 10_000 / max(1, images)))
