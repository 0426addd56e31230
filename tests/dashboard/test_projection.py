"""Embeddings in two dimensions."""

import io
from pathlib import Path

import numpy as np
import pytest
from medloop.bundle import CARD, REFERENCE
from medloop.errors import UntrustedModel
from medloop.testing import tiny_bundle
from medloop_dashboard.projection import MAX_POINTS, principal_plane, project
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def test_keeps_distances_of_points_that_lie_in_a_plane() -> None:
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(50, 2)) * [5, 1]
    turn, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    embeddings = np.hstack([flat, np.zeros((50, 6))]) @ turn + 3
    points, shares = principal_plane(embeddings)

    def distances(values: Floats) -> Floats:
        return np.asarray(np.linalg.norm(values[:, None] - values[None], axis=-1))

    assert np.allclose(distances(points), distances(flat))
    assert sum(shares) == pytest.approx(1)
    assert shares[0] > shares[1]


@pytest.mark.parametrize("shape", [(1, 5), (4, 1), (3, 3)])
def test_degenerate_sets_have_a_plane_too(shape: tuple[int, int]) -> None:
    points, shares = principal_plane(np.ones(shape))
    assert points.shape == (shape[0], 2)
    assert not points.any()
    assert shares == (0.0, 0.0)


def packed(embeddings: NDArray[np.float16], labels: NDArray[np.int64]) -> bytes:
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, embeddings=embeddings, labels=labels)
    return file.getvalue()


def test_reads_a_bundle_and_thins_it_out(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path)
    card = (bundle.folder / CARD).read_bytes()
    assert project(card, (bundle.folder / REFERENCE).read_bytes()).labels == ["dark", "bright"]
    count = 3 * MAX_POINTS + 1
    embeddings = np.random.default_rng(0).normal(size=(count, 4)).astype(np.float16)
    found = project(card, packed(embeddings, np.arange(count) % 2))
    assert len(found.labels) == len(found.points) <= MAX_POINTS
    assert set(found.labels) == {"dark", "bright"}


@pytest.mark.parametrize("case", ["no zip", "cut off", "other names", "unknown class", "pickle"])
def test_what_is_no_reference_is_refused(tmp_path: Path, case: str) -> None:
    card = (tiny_bundle(tmp_path).folder / CARD).read_bytes()
    good = packed(np.zeros((2, 3), np.float16), np.arange(2))
    pickled = io.BytesIO()
    np.savez(pickled, embeddings=np.array([{}], dtype=object), labels=np.arange(1))
    other = io.BytesIO()
    np.savez(other, allow_pickle=False, something=np.arange(2))
    bad = {
        "no zip": b"hello",
        "cut off": good[: len(good) // 2],
        "other names": other.getvalue(),
        "unknown class": packed(np.zeros((2, 3), np.float16), np.array([0, 7])),
        "pickle": pickled.getvalue(),
    }
    with pytest.raises(UntrustedModel, match="embeddings cannot be read"):
        project(card, bad[case])
