"""The gate fails on evidence, and only on evidence, that the challenger is worse."""

from math import comb

import numpy as np
import pytest
from medloop.registry import Version
from medloop.schemas import GateDecision
from medloop_evaluator.gate import ALPHA, _judged, compare_paired, sign_flip_p
from medloop_evaluator.resample import wilson


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
    called = sum(
        compare_paired(correctness(150, 0.9, 2 * seed), correctness(150, 0.9, 2 * seed + 1), None)["p_worse"] < ALPHA
        for seed in range(200)
    )
    assert called <= 20  # at most 10 expected: the exact test is conservative


def test_a_clearly_worse_challenger_is_called_worse() -> None:
    figures = compare_paired(correctness(400, 0.80, 1), correctness(400, 0.95, 2), None)
    assert figures["p_worse"] < 0.001
    assert figures["difference_low"] < figures["difference"] < figures["difference_high"] < 0
    assert figures["difference"] == pytest.approx(figures["challenger_accuracy"] - figures["champion_accuracy"])


def test_a_better_challenger_is_never_called_worse() -> None:
    figures = compare_paired(correctness(400, 0.95, 1), correctness(400, 0.80, 2), None)
    assert figures["p_worse"] > 0.999
    assert figures["difference_low"] > 0


def test_evidence_from_one_group_is_not_enough() -> None:
    champion = np.ones(200, bool)
    challenger = champion.copy()
    challenger[:20] = False
    groups = np.arange(200) // 20
    assert compare_paired(challenger, champion, None)["p_worse"] < 1e-5
    assert compare_paired(challenger, champion, groups)["p_worse"] == 0.5


def test_equal_answers_in_a_small_sample_are_no_proof_of_equality() -> None:
    right = np.ones(20, bool)
    images = compare_paired(right, right, None)
    low, high = wilson(0, 20)
    assert (images["difference_low"], images["difference_high"]) == pytest.approx((low - high, high))
    groups = compare_paired(right, right, np.arange(20) // 4)
    reach = wilson(0, 5)[1]
    assert (groups["difference_low"], groups["difference_high"]) == (-reach, reach)
    one = compare_paired(right, right, np.zeros(20, np.int64))
    assert (one["difference_low"], one["difference_high"]) == (-1.0, 1.0)


def judge(groups_of_ten: int, wrong: list[int], better: int = 0) -> GateDecision:
    """The champion errs in `better` images of the last group, the challenger in all of the groups `wrong`."""
    groups = np.repeat(np.arange(groups_of_ten), 10)
    champion = np.ones(len(groups), bool)
    champion[len(groups) - better :] = False
    figures = compare_paired(~np.isin(groups, wrong), champion, groups)
    return _judged(Version("m", "2", "run"), Version("m", "1", "run"), "data", figures)


@pytest.mark.parametrize("wrong", [[0], [0, 1], [0, 1, 2, 3]])
def test_behind_on_too_few_groups_to_tell_fails_and_says_so(wrong: list[int]) -> None:
    decision = judge(max(len(wrong), 3), wrong)
    assert decision.outcome == "fail"
    assert "cannot be told with so few groups" in decision.reason
    assert decision.figures["informative_groups"] == len(wrong)
    assert decision.figures["p_worse"] >= decision.figures["smallest_p"] == 2.0 ** -len(wrong) >= ALPHA


def test_one_group_of_all_test_images_is_too_few() -> None:
    assert judge(1, [0]).outcome == "fail"


def test_five_groups_can_tell() -> None:
    decision = judge(6, [0, 1, 2, 3, 4])
    assert decision.outcome == "fail"
    assert decision.reason.startswith("Version 2 is significantly worse than champion 1")
    assert "5 of 6 groups" in decision.reason
    assert "0.0312" in decision.reason


def test_a_challenger_that_is_not_behind_passes_however_few_the_groups() -> None:
    assert judge(3, []).outcome == "pass"
    assert judge(3, [], better=10).outcome == "pass"
    assert judge(3, [0], better=10).outcome == "pass"


def test_a_few_single_images_are_a_small_loss() -> None:
    right = np.ones(200, bool)
    behind = right.copy()
    behind[:2] = False
    versions = Version("m", "2", "run"), Version("m", "1", "run")
    assert _judged(*versions, "data", compare_paired(behind, right, None)).outcome == "pass"
    few = _judged(*versions, "data", compare_paired(behind[:4], right[:4], None))
    assert few.outcome == "fail"
    assert "so few images" in few.reason
