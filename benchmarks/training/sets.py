"""The public sets that scores are taken on, as files, and what others have published for them."""

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, slots=True)
class Published:
    """Somebody's test scores on the same file and split."""

    by: str
    auc: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Set:
    """`seeds` are those of its score; `small` ones show whether CutMix helps."""

    file: str
    seeds: tuple[int, ...] = (0, 1, 2)
    small: bool = False
    published: tuple[Published, ...] = ()


SETS = {
    # MedMNIST v2's own table (Yang et al. 2023).
    "pneumoniamnist": Set(
        "pneumoniamnist.npz",
        small=True,
        published=(
            Published("ResNet-18 (28)", 0.944, 0.854),
            Published("ResNet-50 (28)", 0.948, 0.854),
            Published("AutoKeras", 0.947, 0.878),
            Published("Google AutoML Vision", 0.991, 0.946),
        ),
    ),
    "breastmnist": Set(
        "breastmnist.npz",
        seeds=(0, 1, 2, 3, 4),
        small=True,
        published=(
            Published("ResNet-18 (28)", 0.901, 0.863),
            Published("ResNet-50 (28)", 0.857, 0.812),
            Published("AutoKeras", 0.871, 0.831),
            Published("Google AutoML Vision", 0.919, 0.861),
        ),
    ),
    "medical-mnist-12k": Set("medical-mnist-12k.zip"),
    "bccd-cells_64": Set("bccd-cells_64.npz"),
}
CUTMIX_SEEDS = (0, 1, 2, 3, 4)
CALIBRATED = ("pneumoniamnist", "bccd-cells_64")
"""Those whose calibration error has a target."""

_IMAGES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True, slots=True)
class Content:
    """How many images a file holds, and how many of them it calls test; None where it names no splits."""

    images: int
    test: int | None


def content(file: Path) -> Content:
    """Counted in the file itself, so that an image that got lost on the way is noticed."""
    if file.suffix == ".zip":
        with zipfile.ZipFile(file) as archive:
            return Content(sum(Path(name).suffix.lower() in _IMAGES for name in archive.namelist()), None)
    with np.load(file, allow_pickle=False) as arrays:
        counts = {name.removesuffix("_labels"): len(arrays[name]) for name in arrays.files if name.endswith("_labels")}
    return Content(sum(counts.values()), counts.get("test"))


def digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
