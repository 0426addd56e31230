"""Embeddings in two dimensions, by principal components (Pearson 1901)."""

import io
from dataclasses import dataclass
from zipfile import BadZipFile

import numpy as np
from medloop.bundle import read_card
from medloop.errors import UntrustedModel
from numpy.typing import NDArray

MAX_POINTS = 1500
"""Drawn at most, so that a chart stays light in a browser."""


@dataclass(frozen=True, slots=True)
class Projection:
    """`points` float64 [N, 2] of N embeddings, their class `labels` [N], and the share of the variance that each of
    the two axes holds."""

    points: NDArray[np.float64]
    labels: list[str]
    explained: tuple[float, float]


def principal_plane(embeddings: NDArray[np.floating]) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """The coordinates [N, 2] of `embeddings` [N, D] in the plane of largest variance, and the axes' shares of it.

    Each axis points to where its largest coordinate is positive, so that the picture does not depend on the machine.
    """
    centred = embeddings.astype(np.float64) - embeddings.astype(np.float64).mean(axis=0)
    left, strength, _ = np.linalg.svd(centred, full_matrices=False)
    plane = np.zeros((len(centred), 2))
    axes = min(2, len(strength))
    plane[:, :axes] = left[:, :axes] * strength[:axes]
    extreme = plane[np.abs(plane).argmax(axis=0), np.arange(2)]
    plane *= np.where(extreme < 0, -1.0, 1.0)
    total = float((strength**2).sum())
    shares = np.zeros(2)
    if total > 0:
        shares[:axes] = strength[:axes] ** 2 / total
    return plane, (float(shares[0]), float(shares[1]))


def project(card: bytes, reference: bytes) -> Projection:
    """The training images of a bundle, from its `bundle.json` and `reference.npz`.

    Raises UntrustedModel when they are not what this release reads.
    """
    classes = read_card(card).classes
    try:
        with np.load(io.BytesIO(reference), allow_pickle=False) as arrays:
            embeddings, labels = arrays["embeddings"], arrays["labels"]
        # Drawn by lot, always the same: the images may lie in any order, and every n-th could be of one class.
        chosen = np.sort(np.random.default_rng(0).permutation(len(labels))[:MAX_POINTS])
        names = [classes[label] for label in labels[chosen]]
        points, explained = principal_plane(embeddings[chosen])
    except (BadZipFile, ValueError, KeyError, IndexError, OSError) as exc:
        raise UntrustedModel("The bundle's embeddings cannot be read; register the version again.") from exc
    return Projection(points, names, explained)
