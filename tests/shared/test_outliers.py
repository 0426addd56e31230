from pathlib import Path

import numpy as np
import pytest
from medloop.bundle import REFERENCE, write_card
from medloop.errors import UntrustedModel
from medloop.outliers import FALSE_REFER_RATE, OutlierModel, Vectors, decide, fit
from medloop.schemas import Outlier
from medloop.testing import tiny_bundle, tiny_network, tiny_outlier
from numpy.typing import NDArray

Drawn = tuple[Vectors, NDArray[np.int64]]


def drawn(n: int, dimensions: int = 20, *, seed: int = 0, classes: int = 3) -> Drawn:
    """Normal clusters far apart, ten times wider in the first dimension than in the last."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    spread = np.geomspace(10, 1, dimensions)
    centres = np.random.default_rng(99).normal(0, 40, (classes, dimensions))
    return (centres[labels] + rng.normal(0, 1, (n, dimensions)) * spread).astype(np.float32), labels


def fitted(embeddings: Vectors, labels: NDArray[np.int64], calibration: Vectors | None = None) -> OutlierModel:
    model = fit(embeddings, labels, int(labels.max()) + 1, calibration)
    assert model is not None
    return model


@pytest.mark.parametrize("dimensions", [5, 20, 300])
def test_the_score_is_the_distance_in_units_of_the_spread_within_classes(dimensions: int) -> None:
    """A step of k spreads from a centre has length k, whichever way it goes: for a wide direction kept on its own."""
    model = fitted(*drawn(6_000, dimensions))
    centres = np.random.default_rng(99).normal(0, 40, (3, dimensions)).astype(np.float32)
    steps = np.zeros((4, dimensions), np.float32)
    steps[:, 0] = [0, 10, 30, 100]  # 0, 1, 3 and 10 spreads of the first dimension
    for centre in centres:
        found = model.score(centre + steps) * np.sqrt(dimensions)
        # Each of the 2,000 images a class moves its centre a little, and in 300 dimensions that adds up.
        np.testing.assert_allclose(found[1:], [1, 3, 10], rtol=0.2)
        assert found[0] < 0.5


def test_new_images_from_the_same_source_score_about_one_and_spread_over_all_percentiles() -> None:
    model = fitted(*drawn(2_000))
    scores = model.score(drawn(2_000, seed=1)[0])
    assert float(np.square(scores).mean()) == pytest.approx(1, abs=0.05)
    percentiles = model.percentile(scores)
    # Uniform: the mean of 2,000 has a standard error of 0.65, to which the training images add as much.
    assert float(percentiles.mean()) == pytest.approx(50, abs=3)
    assert float(np.quantile(percentiles, 0.9)) == pytest.approx(90, abs=3)


def test_training_images_are_measured_by_what_they_had_no_part_in() -> None:
    """Fewer images than dimensions: measured by their own statistics, new images would all look like outliers."""
    model = fitted(*drawn(60, 200))
    percentiles = model.percentile(model.score(drawn(400, 200, seed=1)[0]))
    assert float(percentiles.mean()) == pytest.approx(50, abs=15)
    naive = np.sort(model.score(drawn(60, 200)[0]))
    assert float(100 * np.searchsorted(naive, model.score(drawn(400, 200, seed=1)[0])).mean() / 60) > 90


def test_the_threshold_refers_no_more_than_promised() -> None:
    embeddings, labels = drawn(1_000)
    new = fitted(embeddings, labels).score(drawn(30_000, seed=2)[0])
    rates = []
    for seed in range(3, 53):  # 50 calibration splits of 150 images
        threshold = fitted(embeddings, labels, drawn(150, seed=seed)[0]).threshold
        assert threshold is not None
        rates.append(float((new > threshold).mean()))
    # In expectation 1/151 ≤ 1 %: the 150th of 150; a split's rate has about that as its own spread too.
    assert float(np.mean(rates)) == pytest.approx(1 / 151, abs=0.004)
    assert float(np.mean(rates)) <= FALSE_REFER_RATE


@pytest.mark.parametrize(("images", "promised"), [(0, False), (98, False), (99, True)])
def test_too_few_calibration_images_promise_nothing(images: int, promised: bool) -> None:
    calibration = drawn(images, seed=1)[0]
    model = fitted(*drawn(300), calibration)
    assert (model.threshold is not None) == promised
    if promised:
        assert model.threshold == model.score(calibration).max()


def test_a_row_scores_the_same_alone_and_in_any_batch() -> None:
    model = fitted(*drawn(300, 100))
    rows = drawn(600, 100, seed=1)[0]
    together = model.score(rows)
    assert together.dtype == np.float32
    np.testing.assert_allclose(together, np.concatenate([model.score(row[None]) for row in rows]), rtol=1e-4)
    assert model.score(rows[:0]).shape == (0,)


def test_odd_training_sets_still_tell_near_from_far() -> None:
    embeddings, labels = drawn(300)
    one_class = labels == 0
    constant = embeddings.copy()
    constant[:, 3] = 7  # a feature that never fires
    lonely = labels.copy()
    lonely[:3] = 5  # classes 3 and 4 have no image, class 5 has three
    broken = embeddings.copy()
    broken[:20, 0] = np.nan
    broken[20:30] = np.inf
    for some, its_labels in [
        (embeddings[one_class], labels[one_class]),
        (constant, labels),
        (embeddings, lonely),
        (broken, labels),
        (np.repeat(embeddings[:1], 50, axis=0), labels[:50]),  # no spread at all
        (embeddings[:12], labels[:12]),
    ]:
        model = fitted(some, its_labels)
        usable = some[np.isfinite(some).all(axis=1)]
        scores = model.score(np.concatenate([usable[:1], usable[:1] + 1_000]))
        assert np.isfinite(model.training).all()
        assert np.isfinite(scores).all()
        assert scores[1] > 10 * scores[0]
        assert model.percentile(scores)[1] == 100


def test_an_embedding_that_is_no_number_is_as_far_as_can_be_said() -> None:
    model = fitted(*drawn(300), drawn(99, seed=1)[0])
    rows = np.full((3, 20), [[np.nan], [np.inf], [3e38]], np.float32)
    for outlier in model.judge(rows):
        assert np.isfinite(outlier.score)
        assert outlier.percentile == 100
        assert decide(["a"], Outlier.model_validate_json(outlier.model_dump_json()))[1] == ["unlike-training"]


def test_fewer_than_ten_images_teach_nothing() -> None:
    assert fit(*drawn(9), 3) is None
    assert fit(np.full((50, 4), np.nan, np.float32), np.zeros(50, np.int64), 1) is None


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_the_statistics_lie_in_the_bundle(tmp_path: Path, threshold: float | None) -> None:
    network = tiny_network(tmp_path, outlier_threshold=threshold)
    model = OutlierModel.load(network.bundle)
    assert model is not None
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 1), dtype=np.uint8) // np.uint8(2)
    found = model.judge(network.run(images).embedding)
    for image, outlier in zip(images, found, strict=True):
        assert outlier.score == pytest.approx(tiny_outlier(image), abs=1e-5)
        assert outlier.percentile == pytest.approx(100 * outlier.score, abs=1)
        assert outlier.threshold == threshold


def test_what_was_fitted_comes_back_from_its_arrays() -> None:
    model = fitted(*drawn(300, 100), drawn(200, 100, seed=1)[0])
    again = OutlierModel.from_arrays(model.to_arrays())
    rows = drawn(50, 100, seed=2)[0]
    np.testing.assert_array_equal(again.score(rows), model.score(rows))
    assert again.threshold == model.threshold


def test_a_bundle_without_statistics_has_none_and_a_broken_one_is_not_trusted(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path)
    with np.load(tmp_path / REFERENCE, allow_pickle=False) as file:
        arrays = dict(file)
    kept = {name: value for name, value in arrays.items() if not name.startswith("outlier_")}
    np.savez(tmp_path / REFERENCE, allow_pickle=False, **kept)
    assert OutlierModel.load(write_card(tmp_path, bundle.card)) is None
    (tmp_path / REFERENCE).unlink()
    assert OutlierModel.load(write_card(tmp_path, bundle.card)) is None

    for name, value in [("outlier_mean", None), ("outlier_basis", np.ones((3, 2), np.float32))]:
        broken = arrays | {name: value} if value is not None else {k: v for k, v in arrays.items() if k != name}
        np.savez(tmp_path / REFERENCE, allow_pickle=False, **broken)
        with pytest.raises(UntrustedModel, match="outlier"):
            OutlierModel.load(write_card(tmp_path, bundle.card))


@pytest.mark.parametrize(
    ("kept", "score", "threshold", "reasons"),
    [
        (["a"], 1.0, 1.0, []),
        (["a"], 9.0, None, []),
        (["a"], None, None, []),
        (["a", "b"], 0.1, 1.0, ["ambiguous"]),
        ([], 0.1, 1.0, ["ambiguous"]),
        (["a"], 1.1, 1.0, ["unlike-training"]),
        (["a", "b"], 1.1, 1.0, ["ambiguous", "unlike-training"]),
    ],
)
def test_what_is_referred_and_why(
    kept: list[str], score: float | None, threshold: float | None, reasons: list[str]
) -> None:
    outlier = None if score is None else Outlier(score=score, percentile=50, threshold=threshold)
    assert decide(kept, outlier) == ("refer" if reasons else "accept", reasons)
