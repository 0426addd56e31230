"""What a model version answered on one split of one data set version, kept so that nothing is computed twice.

They are keyed by the bundle's digest and the data set's id, both digests of content: an entry can never go stale.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from medloop.bundle import Bundle
from medloop.cpus import available_cpus
from medloop.data.cache import open_cache
from medloop.data.manifest import Manifest, Split
from medloop.engines import open_network
from medloop.errors import InvalidDataset, NotFound
from medloop.outliers import OutlierModel
from medloop.storage.objects import ObjectStore
from numpy.typing import NDArray

Progress = Callable[[str, int, int], None]
"""Called with a step's name, how much is done, and how much there is."""

_BATCH = 32  # images: more are no cheaper, and each takes about 10 MiB on its way through ResNet-18 at 224 px


@dataclass(frozen=True, slots=True)
class Answers:
    """`rows` int64 [N]: rows of the manifest, ascending; `probabilities` float32 [N, K], in the card's class order;
    `outlier_scores` float32 [N], None where the bundle holds no statistics of its training images."""

    rows: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    outlier_scores: NDArray[np.float32] | None

    def to_npz(self) -> bytes:
        buffer = io.BytesIO()
        scores = np.zeros(0, np.float32) if self.outlier_scores is None else self.outlier_scores
        np.savez_compressed(
            buffer, allow_pickle=False, rows=self.rows, probabilities=self.probabilities, outlier_scores=scores
        )
        return buffer.getvalue()

    @classmethod
    def from_npz(cls, data: bytes) -> "Answers":
        """Raises KeyError for answers that were kept before outlier scores were."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            scores = arrays["outlier_scores"]
            return cls(arrays["rows"], arrays["probabilities"], scores if len(scores) else None)

    def called_rightly(self, manifest: Manifest, classes: tuple[str, ...]) -> NDArray[np.bool_]:
        """Whether the likeliest of `classes` is the label's name, bool [N]: also between versions whose classes stand
        in another order."""
        called = self.probabilities.argmax(axis=1)
        return np.array([classes[k] == manifest.rows[row].label for k, row in zip(called, self.rows, strict=True)])


def evaluation_key(bundle_digest: str, dataset_id: str, split: Split, file: str) -> str:
    """The object key of a file about one bundle on one split."""
    return f"evaluations/{bundle_digest}/{dataset_id}/{split}/{file}"


def read_or_compute(
    bundle: Bundle, manifest: Manifest, split: Split, objects: ObjectStore, cache_folder: Path, progress: Progress
) -> Answers:
    """The kept answers, or those of the bundle's network on ONNX Runtime, which are then kept.

    Raises UntrustedModel when the golden check fails on this machine or the bundle's outlier statistics cannot be
    read, InvalidDataset when the split is empty.
    """
    key = evaluation_key(bundle.digest, manifest.id, split, "answers.npz")
    try:
        return Answers.from_npz(objects.get(key))
    except (NotFound, KeyError):  # not asked before, or not since outlier scores are kept too
        answers = _compute(bundle, manifest, split, objects, cache_folder, progress)
    objects.put(key, answers.to_npz())
    return answers


def _compute(
    bundle: Bundle, manifest: Manifest, split: Split, objects: ObjectStore, cache_folder: Path, progress: Progress
) -> Answers:
    network = open_network(bundle, threads=available_cpus())
    network.check_golden()
    outliers = OutlierModel.load(bundle)
    cache = open_cache(manifest, bundle.card.preparation, objects, cache_folder, progress=progress)
    rows = cache.indices(split)
    if len(rows) == 0:
        raise InvalidDataset(f"Data set {manifest.name} has no image in its {split} split; build it with one.")
    probabilities, scores = [], []
    for start in range(0, len(rows), _BATCH):
        outputs = network.run(cache.images[rows[start : start + _BATCH]])
        probabilities.append(outputs.probabilities)
        if outliers is not None:
            scores.append(outliers.score(outputs.embedding))
        progress("predict", min(start + _BATCH, len(rows)), len(rows))
    return Answers(rows, np.concatenate(probabilities), np.concatenate(scores) if scores else None)
