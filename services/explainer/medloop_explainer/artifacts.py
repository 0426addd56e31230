"""What explaining a set leaves in the version's MLflow run, under `explanations/`.

    index.json     an ExplanationIndex: what is here, with the quality of each
    summary.csv    the same figures as a table, one line for each image and method
    values.npz     `rows` int64 [N], `integrated_gradients` and `shap` float16 [N, S, S]
    NN_<true>_<predicted>_original.png, …_ig.png, …_shap.png

Images are named by class only: a file's name could tell who the patient is.
"""

import csv
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from medloop.bundle import Pixels
from medloop.data.manifest import Row
from medloop.registry import Registry, translated
from medloop.schemas import ExplainedBy, ExplainedImage, ExplanationIndex, ModelRef
from medloop.vision.overlay import enlarge, overlay
from numpy.typing import NDArray

from medloop_explainer.methods import METHODS, SUFFIX, Method

if TYPE_CHECKING:
    from medloop_explainer.reasons import Reason

FOLDER = "explanations"


class ExplainedSet:
    """Explanations of one version, gathered until they are published."""

    def __init__(self, model: ModelRef, split: str, classes: Sequence[str]) -> None:
        self.model = model
        self.split = split
        self.classes = classes
        self.images: list[ExplainedImage] = []
        self.pictures: dict[str, bytes] = {}
        self.values: dict[Method, list[NDArray[np.float32]]] = {method: [] for method in METHODS}

    def add(
        self,
        number: int,
        row: Row,
        pixels: Pixels,
        probabilities: NDArray[np.float32],
        reasons: "Sequence[Reason]",
    ) -> None:
        """One more image: row `number` of the manifest as uint8 [S, S, C], what the network says of it, float32 [K],
        and a reason for the likeliest class by every method."""
        likeliest = int(probabilities.argmax())
        predicted = self.classes[likeliest]
        stem = f"{len(self.images):02d}_{_slug(row.label)}_{_slug(predicted)}"
        original = f"{stem}_original.png"
        self.pictures[original] = enlarge(pixels)
        attributions = []
        for reason in reasons:
            name = f"{stem}_{SUFFIX[reason.method]}.png"
            self.pictures[name] = overlay(pixels, reason.patches)
            self.values[reason.method].append(reason.values)
            attributions.append(ExplainedBy(method=reason.method, overlay=name, quality=reason.quality))
        self.images.append(
            ExplainedImage(
                row=number,
                image_hash=row.byte_hash,
                label=row.label,
                predicted=predicted,
                probability=float(probabilities[likeliest]),
                original=original,
                attributions=attributions,
            )
        )

    def index(self) -> ExplanationIndex:
        return ExplanationIndex(
            model=self.model,
            split=self.split,
            images=self.images,
            quality={method: _means([_of(image, method).quality for image in self.images]) for method in METHODS},
        )


def publish(registry: Registry, found: ExplainedSet) -> ExplanationIndex:
    """Log everything listed above to the version's run; an earlier set's index is replaced."""
    index = found.index()
    with tempfile.TemporaryDirectory(prefix="medloop-") as temporary:
        write_files(Path(temporary), found, index)
        with translated(registry.tracking_uri, f"Run {found.model.run_id}"):
            registry.client.log_artifacts(found.model.run_id, temporary, FOLDER)
    return index


def write_files(folder: Path, found: ExplainedSet, index: ExplanationIndex) -> None:
    (folder / "index.json").write_text(index.model_dump_json(indent=1), encoding="utf-8")
    for name, picture in found.pictures.items():
        (folder / name).write_bytes(picture)
    # Half the size of float32; attributions are no more exact than its three digits.
    values = {method.replace("-", "_"): np.stack(found.values[method]).astype(np.float16) for method in METHODS}
    rows: NDArray[np.int64] = np.array([image.row for image in found.images])
    np.savez_compressed(folder / "values.npz", allow_pickle=False, rows=rows, **values)
    with (folder / "summary.csv").open("w", newline="", encoding="utf-8") as file:
        figures = sorted({figure for image in found.images for by in image.attributions for figure in by.quality})
        table = csv.writer(file)
        table.writerow(["row", "image_hash", "label", "predicted", "probability", "method", *figures])
        for image in found.images:
            for by in image.attributions:
                of_image = [image.row, image.image_hash, image.label, image.predicted, image.probability]
                table.writerow([*of_image, by.method, *(by.quality.get(figure, "") for figure in figures)])


def _of(image: ExplainedImage, method: Method) -> ExplainedBy:
    return next(by for by in image.attributions if by.method == method)


def _means(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(each[name] for each in figures) / len(figures) for name in figures[0]}


def _slug(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", label).strip("-.")[:60] or "class"
