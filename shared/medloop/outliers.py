"""How unlike its training images an image is, and whether a person should decide instead of the model.

The score is the distance to the nearest class in embedding space, in units of the spread within classes
(class-conditional Mahalanobis distance, Lee et al. 2018), with a covariance shrunk as Ledoit and Wolf (2004) do. Only
the span of the class centres and of the 64 widest directions within classes keeps a covariance of its own; in all
others together, where there are more dimensions than that, the spread is one number, so that 2,048 dimensions cost a
few microseconds too. Measured against nearest neighbours in docs/decisions/0009-outliers.md.

What the network has learnt lies tighter than what it has not seen, so two figures say how far is far:

- `percentile` is among training images, each measured against centres and a covariance that it had no part in (five
  folds; only the shrinkage weight is from all of them). The network has seen them, so new images lie a little further;
- `threshold` is a conformal quantile of the calibration images, which neither the network nor the statistics have
  seen: a new image that is exchangeable with them lies beyond it with a probability of at most 1 %, on average over
  calibration splits (Bates et al. 2023). For one split the share differs, the more the fewer images it has.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from medloop.bundle import REFERENCE, Bundle
from medloop.errors import UntrustedModel
from medloop.schemas import Outlier, ReferReason

FALSE_REFER_RATE = 0.01
"""Of images like the calibration images, the share that may be referred as unlike the training images, on average
over calibration splits."""
DIRECTIONS = 64
"""Widest directions within classes that keep a variance of their own."""
FEWEST_IMAGES = 10
"""Below this many training images there is nothing to be unlike."""

_FOLDS = 5
_ROUNDS = 6  # of subspace iteration
_SMALLEST_VARIANCE = 1e-6  # of the mean variance: a direction that never varied must not divide by nothing
_ROWS = 256  # measured at once, so that many classes take no gigabytes
_FURTHEST = float(np.finfo(np.float32).max)
_PREFIX = "outlier_"

Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where classes lie and how wide they are: `mean` f32 [D]; `basis` f32 [D, Q] with orthonormal columns; `whitening`
    f32 [Q, Q], which makes the spread within classes 1 in the span of `basis`; `centres` f32 [K, Q] of the classes
    that have images, whitened; `residual` f32 [], the spread in a direction outside that span."""

    mean: Vectors
    basis: Vectors
    whitening: Vectors
    centres: Vectors
    residual: Vectors

    def distances(self, embeddings: Vectors) -> Vectors:
        """f32 [B] ≥ 0 for f32 [B, D]: to the nearest centre, as root mean square over the D dimensions, so that 1 is
        usual. What is not finite lies as far away as a float32 can say."""
        found = [self._distances(embeddings[start : start + _ROWS]) for start in range(0, len(embeddings), _ROWS)]
        return np.concatenate(found) if found else np.zeros(0, np.float32)

    def _distances(self, embeddings: Vectors) -> Vectors:
        with np.errstate(over="ignore", invalid="ignore"):  # told by the value instead
            centred = embeddings - self.mean  # [B, D]
            inside = centred @ self.basis  # [B, Q]
            outside = (centred - inside @ self.basis.T) / self.residual
            steps = (inside @ self.whitening)[:, None, :] - self.centres  # [B, K, Q]
            nearest = np.square(steps).sum(axis=2).min(axis=1)
            found: Vectors = np.sqrt((nearest + np.square(outside).sum(axis=1)) / np.float32(len(self.mean)))
        found[~np.isfinite(found)] = _FURTHEST
        return found


@dataclass(frozen=True, slots=True)
class OutlierModel:
    """The statistics of a bundle's training images. `training` f32 [N] are their own scores, ascending; `threshold` is
    the score beyond which an answer is referred, None where too few calibration images were there to promise the
    rate."""

    geometry: Geometry
    training: Vectors
    threshold: float | None

    def score(self, embeddings: Vectors) -> Vectors:
        """f32 [B] ≥ 0 for embeddings f32 [B, D]: the distance to the nearest class, about 1 for a training image."""
        return self.geometry.distances(embeddings)

    def percentile(self, scores: Vectors) -> NDArray[np.float64]:
        """f64 [B] in [0, 100]: the share of training images, in percent, that lie nearer than `scores` f32 [B]."""
        nearer: NDArray[np.int64] = np.searchsorted(self.training, scores)
        return 100.0 * nearer / len(self.training)

    def judge(self, embeddings: Vectors) -> list[Outlier]:
        """What an answer says about each of the embeddings f32 [B, D]."""
        return self.place(self.score(embeddings))

    def place(self, scores: Vectors) -> list[Outlier]:
        """The same from scores f32 [B] that were found before."""
        percentiles = self.percentile(scores).tolist()
        return [
            Outlier(score=score, percentile=percentile, threshold=self.threshold)
            for score, percentile in zip(scores.tolist(), percentiles, strict=True)
        ]

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """What stands in `reference.npz` beside the embeddings."""
        geometry = {name: getattr(self.geometry, name) for name in Geometry.__slots__}
        threshold = np.array([] if self.threshold is None else [self.threshold], np.float32)
        return {
            _PREFIX + name: value
            for name, value in (geometry | {"training": self.training, "threshold": threshold}).items()
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Raises KeyError where one is missing, ValueError where they do not fit together."""
        geometry = Geometry(**{name: arrays[_PREFIX + name] for name in Geometry.__slots__})
        training, threshold = arrays[_PREFIX + "training"], arrays[_PREFIX + "threshold"]
        model = cls(geometry, training, float(threshold[0]) if threshold.size else None)
        if not len(training):
            raise ValueError("no training scores")
        model.score(np.zeros((1, len(geometry.mean)), np.float32))  # shapes that do not fit fail here, not in an answer
        return model

    @classmethod
    def load(cls, bundle: Bundle) -> "OutlierModel | None":
        """The bundle's statistics, without reading its embeddings; None where it holds none.

        Raises UntrustedModel when they cannot be read.
        """
        path = bundle.folder / REFERENCE
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                if not any(name.startswith(_PREFIX) for name in arrays.files):
                    return None
                return cls.from_arrays(arrays)
        except (OSError, ValueError, KeyError, BadZipFile) as exc:
            raise UntrustedModel(f"The outlier statistics in {REFERENCE} cannot be read: {exc}.") from exc


def decide(
    prediction_set: Sequence[str], outlier: Outlier | None
) -> tuple[Literal["accept", "refer"], list[ReferReason]]:
    """Whether an answer stands for itself or goes to a person, and why.

    Referred is what leaves more (or less) than one class possible, and what lies beyond the outlier threshold.
    """
    reasons: list[ReferReason] = []
    if len(prediction_set) != 1:
        reasons.append("ambiguous")
    if outlier is not None and outlier.threshold is not None and outlier.score > outlier.threshold:
        reasons.append("unlike-training")
    return ("refer" if reasons else "accept"), reasons


def fit(
    embeddings: Vectors, labels: NDArray[np.int64], classes: int, calibration: Vectors | None = None
) -> OutlierModel | None:
    """Learn from the training images' `embeddings` [N, D] and `labels` [N] in [0, classes), and set the threshold by
    the `calibration` images' embeddings [M, D], which must be others.

    Rows that are not finite are left out, classes without images have no centre, and directions without spread get a
    small one. None where fewer than 10 images remain.
    """
    usable = np.isfinite(embeddings).all(axis=1)
    embeddings, labels = embeddings[usable], labels[usable]
    if len(embeddings) < FEWEST_IMAGES:
        return None
    folds = _folds(labels)
    parts = [_Moments.of(embeddings[folds == k], labels[folds == k], classes) for k in range(_FOLDS)]
    whole = _Moments(*(sum(getattr(part, name) for part in parts) for name in _Moments.__slots__))
    shrinkage = _shrinkage(embeddings - whole.means()[labels], whole)
    training = np.empty(len(embeddings), np.float32)
    for k, part in enumerate(parts):
        training[folds == k] = _geometry(whole.without(part), shrinkage).distances(embeddings[folds == k])
    geometry = _geometry(whole, shrinkage)
    return OutlierModel(geometry, np.sort(training), _threshold(geometry, calibration))


@dataclass(frozen=True, slots=True)
class _Moments:
    """Sums over images, which add up over folds: `counts` f64 [K], `sums` f64 [K, D] by class, `products` f64
    [D, D]."""

    counts: NDArray[np.float64]
    sums: NDArray[np.float64]
    products: NDArray[np.float64]

    @classmethod
    def of(cls, embeddings: Vectors, labels: NDArray[np.int64], classes: int) -> Self:
        values = embeddings.astype(np.float64)
        members = (labels[:, None] == np.arange(classes)).astype(np.float64)  # [N, K]
        return cls(members.sum(axis=0), members.T @ values, values.T @ values)

    def without(self, part: "_Moments") -> "_Moments":
        return _Moments(self.counts - part.counts, self.sums - part.sums, self.products - part.products)

    def means(self) -> NDArray[np.float64]:
        """f64 [K, D] of each class; 0 where it has no image."""
        found: NDArray[np.float64] = self.sums / np.maximum(self.counts, 1)[:, None]
        return found

    def covariance(self) -> NDArray[np.float64]:
        """f64 [D, D] within classes, about their means, divided by the number of images."""
        scatter: NDArray[np.float64] = self.products - self.sums.T @ self.means()
        scatter += scatter.T  # exactly symmetric
        return scatter / (2 * float(self.counts.sum()))


def _shrinkage(deviations: NDArray[np.float64], whole: _Moments) -> float:
    """The weight in [0, 1] of a spherical covariance beside that of `deviations` [N, D] (Ledoit and Wolf 2004, lemmas
    3.2 to 3.4)."""
    images, dimensions = deviations.shape
    covariance = whole.covariance()
    squares = float(np.square(covariance).sum())
    from_sphere = squares - np.trace(covariance) ** 2 / dimensions
    noise = (float(np.square(np.square(deviations).sum(axis=1)).mean()) - squares) / images
    return min(1.0, max(0.0, noise / from_sphere)) if from_sphere > 0 else 1.0


def _geometry(moments: _Moments, shrinkage: float) -> Geometry:
    there = moments.counts > 0
    images, means = moments.counts.sum(), moments.means()[there]
    mean = moments.sums.sum(axis=0) / images
    covariance = moments.covariance() * images / max(1.0, images - len(means))
    dimensions = len(mean)
    spread = float(np.trace(covariance)) / dimensions or 1.0
    covariance = (1 - shrinkage) * covariance + shrinkage * spread * np.eye(dimensions)
    if dimensions > DIRECTIONS + len(means):
        spanning = np.concatenate([_widest(covariance), (means - mean).T], axis=1)
        basis = np.linalg.qr(spanning).Q  # [D, Q]
    else:
        basis = np.eye(dimensions)
    variances, axes = np.linalg.eigh(basis.T @ covariance @ basis)
    smallest = _SMALLEST_VARIANCE * spread
    whitening = axes / np.sqrt(np.maximum(variances, smallest))  # [Q, Q]
    left = (np.trace(covariance) - variances.sum()) / max(1, dimensions - basis.shape[1])
    return Geometry(
        mean=mean.astype(np.float32),
        basis=basis.astype(np.float32),
        whitening=whitening.astype(np.float32),
        centres=((means - mean) @ basis @ whitening).astype(np.float32),
        residual=np.array(math.sqrt(max(left, smallest)), np.float32),
    )


def _widest(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """f64 [D, 64]: orthonormal, about the span of the widest directions (subspace iteration: Halko et al. 2011,
    algorithm 4.4). All eigenvectors of 2,048 dimensions would take seconds, and those of equal width may be swapped."""
    found = np.random.default_rng(0).normal(size=(len(covariance), DIRECTIONS))
    for _ in range(_ROUNDS):
        found = np.linalg.qr(covariance @ found).Q
    return found


def _folds(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [N] in [0, 5): every class spread evenly, the same each time."""
    order = np.lexsort((np.random.default_rng(0).permutation(len(labels)), labels))
    folds = np.empty(len(labels), np.int64)
    folds[order] = np.arange(len(labels)) % _FOLDS
    return folds


def _threshold(geometry: Geometry, calibration: Vectors | None) -> float | None:
    """The ⌈(n + 1) · 0.99⌉-th smallest score of n calibration images: None for n < 99, of which none is rare enough."""
    if calibration is None:
        return None
    scores = np.sort(geometry.distances(calibration[np.isfinite(calibration).all(axis=1)]))
    rank = math.ceil((len(scores) + 1) * (1 - FALSE_REFER_RATE) - 1e-9)  # a hair down: 100 · 0.99 is 99
    return float(scores[rank - 1]) if rank <= len(scores) else None
