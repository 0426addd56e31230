"""Weights redraw what they should; intervals cover as often as they claim."""

import numpy as np
import pytest
from medloop_evaluator.metrics import Scorer, estimates
from medloop_evaluator.resample import Resampling, basic, clusters, means, newcombe, percentile, wilson


def _weights(resampling: Resampling) -> np.ndarray:
    return np.concatenate(list(resampling.blocks()))


def test_stratified_weights_keep_the_size_of_every_class() -> None:
    labels = np.array([0] * 7 + [1] * 3 + [2])
    weights = _weights(Resampling(labels, None, replicates=200))
    assert weights.shape == (200, 11)
    for label, size in enumerate((7, 3, 1)):
        assert (weights[:, labels == label].sum(axis=1) == size).all()


def test_clustered_weights_draw_whole_groups() -> None:
    numbers = np.array([0, 0, 0, 1, 1, 2])
    weights = _weights(Resampling(np.zeros(6, np.int64), numbers, replicates=300))
    for group in range(3):
        members = weights[:, numbers == group]
        assert (members == members[:, :1]).all()
    assert (weights[:, [0, 3, 5]].sum(axis=1) == 3).all()


def test_same_seed_same_weights_and_blocks_do_not_change_the_number() -> None:
    labels = np.zeros(30_000, np.int64)
    once = Resampling(labels, None, replicates=300, seed=4)
    sizes = [len(block) for block in once.blocks()]
    assert sum(sizes) == 300
    assert len(sizes) > 1
    assert np.array_equal(next(once.blocks()), next(once.blocks()))


def test_clusters_are_none_unless_they_say_more_than_images() -> None:
    assert clusters(["", "", ""]) is None
    assert clusters(["a", "b", "c"]) is None
    numbers = clusters(["a", "", "a", ""])
    assert numbers is not None
    assert numbers[0] == numbers[2]
    assert len(set(numbers.tolist())) == 3


def test_images_of_one_group_are_not_taken_for_independent() -> None:
    numbers = clusters(["a"] * 5)
    assert numbers is not None
    assert numbers.tolist() == [0] * 5


def test_wilson_closed_form_and_ends() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(0, 10)
    assert low == 0.0
    assert high == pytest.approx(1.959963984540054**2 / (10 + 1.959963984540054**2))
    assert wilson(10, 10)[0] == pytest.approx(1 - high)
    assert wilson(10, 10)[1] == 1.0


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_wilson_covers_about_as_often_as_it_claims(share: float) -> None:
    draws = np.random.default_rng(0).binomial(400, share, 2000)
    intervals = np.array([wilson(int(successes), 400) for successes in draws])
    covered = ((intervals[:, 0] <= share) & (share <= intervals[:, 1])).mean()
    assert 0.92 <= covered <= 0.98


def test_newcombe_agrees_with_his_published_examples() -> None:
    # Newcombe 1998, Statistics in Medicine 17:2635, method 10
    assert newcombe(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=5e-5)
    assert newcombe(54, 0, 0, 0) == pytest.approx((-0.0664, 0.0664), abs=5e-5)


def test_newcombe_covers_about_as_often_as_it_claims() -> None:
    counts = np.random.default_rng(0).multinomial(100, [0.8, 0.06, 0.1, 0.04], 1000)
    intervals = np.array([newcombe(*(int(count) for count in row)) for row in counts])
    assert 0.92 <= ((intervals[:, 0] <= -0.04) & (intervals[:, 1] >= -0.04)).mean() <= 0.99


def test_percentile_leaves_undefined_replicates_out() -> None:
    assert percentile(np.array([np.nan, 0.5, 0.5])) == (0.5, 0.5)


def test_basic_interval_reflects_and_holds_its_value() -> None:
    low, high = basic(0.1, np.full(10, 0.12))
    assert low == pytest.approx(0.08)
    assert high == 0.1
    assert basic(0.01, np.full(10, 0.3))[0] == 0.0


def test_a_clustered_interval_is_wider_where_groups_agree_with_themselves() -> None:
    rng = np.random.default_rng(1)
    numbers = np.repeat(np.arange(40), 10)
    right = np.repeat(rng.random(40) < 0.8, 10).astype(float)
    strata = np.zeros(400, np.int64)

    def width(resampling: Resampling) -> float:
        low, high = percentile(_weights(resampling) @ right / 400)
        return high - low

    assert width(Resampling(strata, numbers)) > 2 * width(Resampling(strata, None))


@pytest.mark.parametrize("groups", [None, np.arange(60) // 4, np.zeros(60, np.int64)])
@pytest.mark.parametrize("mistakes", [0, 7])
def test_the_mean_of_what_is_right_is_the_accuracy_with_its_interval(groups: np.ndarray | None, mistakes: int) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=60)
    called = np.where(np.arange(60) % 8 < mistakes / 7, 1 - labels, labels)
    scorer = Scorer(np.where(called[:, None] == np.arange(2), 0.9, 0.1), labels, "ab")
    resampling = Resampling(labels, groups)
    accuracy, found = estimates(scorer, resampling)["accuracy"], means({"x": (scorer.correct, labels >= 0)}, resampling)
    assert found["x"].method == accuracy.method
    assert list(found["x"].model_dump(exclude={"method"}).values()) == pytest.approx(
        [accuracy.value, accuracy.low, accuracy.high]
    )


def test_a_mean_is_of_the_images_it_is_taken_over_alone() -> None:
    values, part = np.linspace(0, 1, 50), np.arange(50) < 20
    columns = {"part": (values, part), "half": (np.full(50, 0.5), ~part), "none": (values, np.zeros(50, bool))}
    found = means(columns, Resampling(np.zeros(50, np.int64), None))
    assert set(found) == {"part", "half"}
    mean = values[:20].mean()
    assert found["part"].value == pytest.approx(mean)
    assert found["part"].method == "bootstrap"
    assert found["part"].low < mean < found["part"].high < 0.5
    assert (found["half"].low, found["half"].high) == wilson(15, 30)  # replicates that are all the same prove nothing
    in_groups = means(columns, Resampling(np.zeros(50, np.int64), np.arange(50) // 20))
    assert (in_groups["part"].low, in_groups["part"].high) == (0.0, 1.0)  # one group
    assert in_groups["half"].method == "cluster-wilson"
    assert (in_groups["half"].low, in_groups["half"].high) == pytest.approx(wilson(1, 2))
