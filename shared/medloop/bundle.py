"""The bundle: what a model version holds, how it is checked, and what its answers mean.

A bundle is a folder. `bundle.json` (the *card*) names every other file with its SHA-256, so the digest of the card
stands for the whole; an approval signs that digest. Nothing is unpickled on the way in.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from medloop.errors import UntrustedModel
from medloop.schemas import now
from medloop.vision.prepare import PreparationSpec

CARD = "bundle.json"
MODEL = "model.onnx"
GOLDEN = "golden.npz"
REFERENCE = "reference.npz"
WEIGHTS = "weights.safetensors"
ARCHITECTURE = "architecture.json"
MLMODEL = "MLmodel"

MAX_PROBABILITY_DIFFERENCE = 1e-4
"""How far two runs of one float32 network may lie apart (torch and ONNX Runtime agree to about 1e-6)."""

Pixels = NDArray[np.uint8]


class Conformal(BaseModel):
    """Split conformal threshold (Vovk et al. 2005, LAC score 1 − p): a class belongs to the prediction set when its
    probability is at least 1 − `threshold`, and where none is, `set_size` says which do. `images` is the number of
    calibration images it rests on, the same that set the temperature: so the coverage of new images from their source
    is about `coverage`, or more, on average over calibration splits."""

    model_config = ConfigDict(frozen=True)

    coverage: float = Field(gt=0, lt=1)
    threshold: float = Field(ge=0, le=1)
    images: int = Field(ge=0)


class Card(BaseModel):
    """`bundle.json`. `operating_thresholds` maps a class to the probability above which it is called (one versus
    rest, Youden's J on the calibration split); `files` maps a file name to its SHA-256 in hex."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: int = 1
    model: str
    classes: tuple[str, ...] = Field(min_length=2)
    preparation: PreparationSpec
    architecture: str
    temperature: float = Field(gt=0)
    conformal: Conformal
    operating_thresholds: dict[str, float]
    dataset_id: str
    run_id: str
    git_commit: str | None
    seed: int
    packages: dict[str, str]
    created_at: datetime = Field(default_factory=now)
    files: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Outputs:
    """What the network says about N images: `probabilities` f32 [N, K], `embedding` f32 [N, D], `cam` f32
    [N, K, h, w] where the architecture has one."""

    probabilities: NDArray[np.float32]
    embedding: NDArray[np.float32]
    cam: NDArray[np.float32] | None


@dataclass(frozen=True, slots=True)
class Golden:
    """Inputs with known answers.

    `encoded` are image files whose preparation must give `pixels` uint8 [M, S, S, C] to the bit; the network must give
    `probabilities` f32 [P, K] for `prepared` uint8 [P, S, S, C].
    """

    encoded: tuple[bytes, ...]
    pixels: Pixels
    prepared: Pixels
    probabilities: NDArray[np.float32]

    def save(self, path: Path) -> None:
        files = {f"encoded_{i:02d}": np.frombuffer(data, np.uint8) for i, data in enumerate(self.encoded)}
        np.savez_compressed(
            path,
            allow_pickle=False,
            pixels=self.pixels,
            prepared=self.prepared,
            probabilities=self.probabilities,
            **files,
        )

    @classmethod
    def load(cls, path: Path) -> "Golden":
        with np.load(path, allow_pickle=False) as arrays:
            names = sorted(name for name in arrays.files if name.startswith("encoded_"))
            return cls(
                encoded=tuple(arrays[name].tobytes() for name in names),
                pixels=arrays["pixels"],
                prepared=arrays["prepared"],
                probabilities=arrays["probabilities"],
            )


@dataclass(frozen=True, slots=True)
class Bundle:
    """A folder whose files were found to be what its card says. `digest` is the SHA-256 of the card."""

    folder: Path
    card: Card
    digest: str

    @property
    def golden(self) -> Golden:
        return Golden.load(self.folder / GOLDEN)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_card(folder: Path, card: Card) -> Bundle:
    """Seal `folder`: hash every file in it, and write the card last."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != CARD)
    sealed = card.model_copy(update={"files": {name: sha256_file(folder / name) for name in names}})
    (folder / CARD).write_text(json.dumps(sealed.model_dump(mode="json"), indent=1, sort_keys=True) + "\n")
    return read_bundle(folder)


def read_bundle(folder: Path) -> Bundle:
    """Read and verify a bundle.

    Raises UntrustedModel when the card is missing or malformed, or when a file is missing or has another hash.
    """
    try:
        text = (folder / CARD).read_bytes()
    except FileNotFoundError as exc:
        raise UntrustedModel(f"This is no bundle: {CARD} is missing. Register the version again.") from exc
    card = read_card(text)
    missing = {MODEL, GOLDEN} - card.files.keys()
    if missing:
        raise UntrustedModel(f"{CARD} does not name {', '.join(sorted(missing))}; register the version again.")
    for name, expected in card.files.items():
        # A name with a folder in it could lead anywhere.
        if Path(name).name != name:
            raise UntrustedModel(f"{CARD} names a file outside the bundle: {name!r}.")
        path = folder / name
        if not path.is_file():
            raise UntrustedModel(f"{name} is missing from the bundle; register the version again.")
        if sha256_file(path) != expected:
            raise UntrustedModel(f"{name} is not the file that was registered: its SHA-256 differs from the card's.")
    return Bundle(folder, card, hashlib.sha256(text).hexdigest())


def read_card(text: bytes) -> Card:
    """The card in `bundle.json`; raises UntrustedModel, naming the member that is not as it must be."""
    try:
        return Card.model_validate_json(text)
    except ValidationError as exc:
        raise UntrustedModel(f"{CARD} {_fault(exc.errors(include_url=False)[0])}.") from exc


def _fault(first: ErrorDetails) -> str:
    """What is wrong with a card, and what to do, in words that need no knowledge of how it is checked."""
    member = ".".join(map(str, first["loc"]))[:100]  # names of files are whatever somebody wrote
    if not member:
        return "holds no JSON object; register the version again"
    if first["type"] == "missing":
        return f"lacks {member}; register the version again"
    if first["type"] == "extra_forbidden":
        return f"holds {member}, which this release does not know; update MedLoop"
    return f"holds a value of {member} that this release does not take; register the version again, or update MedLoop"


def prediction_set(probabilities: NDArray[np.float32], card: Card) -> list[str]:
    """Classes that cannot be ruled out at the card's coverage (`set_size`), likeliest first; never empty.
    `probabilities` is f32 [K]."""
    order = np.argsort(-probabilities, kind="stable")
    size = set_size(probabilities[order].tolist(), card.conformal)
    return [card.classes[k] for k in order[:size]]


def set_size(descending: Sequence[float], conformal: Conformal) -> int:
    """How many of the likeliest classes make up the prediction set; `descending` are all probabilities of one image.

    Those of at least 1 − threshold. Where there is none, the network gives every class less than it gave the right one
    of nearly all calibration images (about a share of `coverage` of them), and a set of the likeliest class alone would
    hide it: then as many as reach the coverage together. This only adds classes, so right classes are in their sets at
    least as often as by the threshold alone; for an accurate network, clearly more often.
    """
    limit = 1.0 - conformal.threshold
    size = sum(probability >= limit for probability in descending)
    if size == 0:
        together = 0.0
        while together < conformal.coverage and size < len(descending):
            together += descending[size]
            size += 1
    return size


def load_reference(bundle: Bundle) -> Mapping[str, NDArray[Any]]:
    """From `reference.npz`: `embeddings` f16 [N, D], `labels` int64 [N], `hashes` uint8 [N, 32] of training images.
    What `medloop.outliers` keeps there beside them is not read."""
    with np.load(bundle.folder / REFERENCE, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in ("embeddings", "labels", "hashes")}
