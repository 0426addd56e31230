"""What may be done to a training image without making it one of another class: by modality, or by its looks."""

from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

Modality = Literal["auto", "radiograph", "ct-mr", "histology", "cells", "photo"]

_FREE = 0.3
"""η² (what `look` finds) up to which `auto` takes brightness and contrast for chance. Where classes are findings in one
kind of picture, they have most of that spread in common; where they are kinds of pictures, it is mostly what sets them
apart. The bound is low, so that what is doubtful is left alone."""


class Looks(NamedTuple):
    """What `auto` needs to know of the training images: how many channels they are prepared with, 1 or 3, and which
    share η² of the spread of their brightness, and of their contrast, their class explains (`explained`)."""

    channels: int = 1
    brightness: float = 1.0
    contrast: float = 1.0


class Moves(BaseModel):
    """How far training images are changed before they are mixed; all zero and False leaves them as they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    turn: float = Field(default=0.0, ge=0, le=180)
    """Degrees to either side."""
    zoom: float = Field(default=0.0, ge=0, lt=1)
    """Relative, larger or smaller."""
    shift: float = Field(default=0.0, ge=0, le=0.5)
    """Of the side, in both directions."""
    horizontal_flip: bool = False
    vertical_flip: bool = False
    right_angles: bool = False
    """Turns by 90, 180 and 270 degrees, as likely as none."""
    brightness: float = Field(default=0.0, ge=0, le=1)
    """Added or taken away, of the full range."""
    contrast: float = Field(default=0.0, ge=0, lt=1)
    """Relative, about the image's own mean."""
    erase_probability: float = Field(default=0.0, ge=0, le=1)
    """Of an image losing a rectangle (Zhong et al. 2020)."""

    @property
    def in_place(self) -> bool:
        """No pixel goes anywhere else."""
        far = self.turn or self.zoom or self.shift
        return not (far or self.horizontal_flip or self.vertical_flip or self.right_angles)


_NO_ORIENTATION: Final = {"horizontal_flip": True, "vertical_flip": True, "right_angles": True}
_SAME_VIEW: Final = Moves(turn=10.0, zoom=0.1, shift=0.08)
"""Small enough that a radiologist would still call the picture the same view."""


def _policy(intensity: float, *, zoom: float = 0.1, turned: bool = False, mirrored: bool = False) -> Moves:
    changes = {"zoom": zoom, "brightness": intensity, "contrast": intensity, "horizontal_flip": mirrored}
    return _SAME_VIEW.model_copy(update=changes | (_NO_ORIENTATION if turned else {}))


POLICIES: Final[dict[Modality, Moves]] = {
    # The exposure differs from one picture to the next. No flips: the heart is on one side.
    "radiograph": _policy(0.1),
    # Grey values are a measurement (CT), or windowed by a protocol.
    "ct-mr": _policy(0.0),
    # Stains differ between laboratories. Magnification is fixed, and the size of a nucleus a sign.
    "histology": _policy(0.1, zoom=0.05, turned=True),
    # As histology, but the shade of one stain tells one granulocyte from another.
    "cells": _policy(0.05, turned=True),
    # Skin, eyes and wounds as a person holds the camera: what is above stays above.
    "photo": _policy(0.1, mirrored=True),
}


def choose_moves(modality: Modality, looks: Looks) -> Moves:
    """The policy of `modality`; `auto` goes by what can be seen.

    Grey images come from devices that look at a body from a known side, hence no flips; coloured ones mostly through a
    microscope, hence flips and right-angle turns. Brightness and contrast are changed, by a twentieth, where the class
    hardly explains how they spread: what labels do not depend on may be changed without making an image one of another
    class. Where it does explain them (organs in CT), they are left alone.
    """
    if modality != "auto":
        return POLICIES[modality]
    free = max(looks.brightness, looks.contrast) <= _FREE
    return _policy(0.05 if free else 0.0, turned=looks.channels == 3)


def look(pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> Looks:
    """Looks of training images uint8 [N, S, S, C] and their labels [N]; a few thousand, evenly drawn, are enough."""
    flat = pixels.reshape(len(pixels), -1)
    return Looks(pixels.shape[3], explained(flat.mean(axis=1), labels), explained(flat.std(axis=1), labels))


def explained(values: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """η², the share of the variance of `values` [N] that lies between classes, in [0, 1]; 1 where nothing varies."""
    counts = np.bincount(labels)
    means = np.bincount(labels, weights=values) / np.maximum(1, counts)
    total = float(np.square(values - values.mean()).sum())
    between = float((counts * np.square(means - values.mean())).sum())
    return min(1.0, between / total) if total > 0 else 1.0
