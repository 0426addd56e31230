"""The gate fails on evidence, and only on evidence, that the challenger is worse."""

from math import comb

import numpy as np
import pytest
from medloop_evaluator.gate import ALPHA, compare_paired, sign_flip_p


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (0, 5), (3, 12), (10, 10), (60, 90), (300, 250)])
def test_without_groups_it_is_the_exact_mcnemar_test(better: int, worse: int) -> None:
    differences = np.array([1] * better + [-1] * worse + [0] * 40)
    discordant = better + worse
    expected = sum(comb(discordant, k) for k in range(better + 1)) / 2**discordant  # P(X <= better), X ~ B(n, 1/2)
    assert sign_flip_p(differences) == pytest.approx(expected, rel=1e-9)


def test_groups_change_sides_as_a_whole() -> None:
    # One group of ten wrong images is one piece of evidence, not ten.
    assert sign_flip_p(np.array([-10])) == 0.5
    assert sign_flip_p(np.array([-10, -10])) == 0.25
    assert sign_flip_p(np.array([-10, 3])) == 0.5
    assert sign_flip_p(np.array([-1] * 20)) == pytest.approx(2.0**-20)


def correctness(images: int, accuracy: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(images) < accuracy


def test_an_equal_challenger_is_called_worse_no_oftener_than_alpha() -> None:
    strata = np.zeros(150, np.int64)
    called = sum(
        compare_paired(correctness(150, 0.9, 2 * seed), correctness(150, 0.9, 2 * seed + 1), strata, None)["p_worse"]
        < ALPHA
        for seed in range(200)
    )
    assert called <= 20  # at most 10 expected: the exact test is conservative


def test_a_clearly_worse_challenger_is_called_worse() -> None:
    figures = compare_paired(correctness(400, 0.80, 1), correctness(400, 0.95, 2), np.zeros(400, np.int64), None)
    assert figures["p_worse"] < 0.001
    assert figures["difference_low"] < figures["difference"] < figures["difference_high"] < 0
    assert figures["difference"] == pytest.approx(figures["challenger_accuracy"] - figures["champion_accuracy"])


def test_a_better_challenger_is_never_called_worse() -> None:
    figures = compare_paired(correctness(400, 0.95, 1), correctness(400, 0.80, 2), np.zeros(400, np.int64), None)
    assert figures["p_worse"] > 0.999
    assert figures["difference_low"] > 0


def test_evidence_from_one_group_is_not_enough() -> None:
    champion = np.ones(200, bool)
    challenger = champion.copy()
    challenger[:20] = False
    strata, groups = np.zeros(200, np.int64), np.arange(200) // 20
    assert compare_paired(challenger, champion, strata, None)["p_worse"] < 1e-5
    assert compare_paired(challenger, champion, strata, groups)["p_worse"] == 0.5
