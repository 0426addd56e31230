"""Metrics agree with scikit-learn and closed forms, under any weighting."""

import time

import numpy as np
import pytest
from medloop.errors import InvalidRequest
from medloop_evaluator.metrics import Scorer, confusion, estimates, per_class, reliability, roc, worst
from medloop_evaluator.resample import Resampling, percentile, wilson
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    log_loss,
    precision_recall_fscore_support,
    roc_auc_score,
    roc_curve,
)


def answers(images: int = 300, classes: int = 4, seed: int = 0, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that know something about the labels; with `ties`, rounded so that many scores are equal."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=images)
    logits = rng.normal(size=(images, classes)) + 1.5 * np.eye(classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    if ties:
        probabilities = np.round(probabilities, 1) + 1e-6
        probabilities /= probabilities.sum(axis=1, keepdims=True)
    return probabilities, labels


def make(probabilities: np.ndarray, labels: np.ndarray) -> Scorer:
    return Scorer(probabilities, labels, [f"class {k}" for k in range(probabilities.shape[1])])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("weighting", ["none", "random"])
def test_scores_agree_with_scikit_learn(ties: bool, weighting: str) -> None:
    probabilities, labels = answers(ties=ties)
    scorer = make(probabilities, labels)
    weights = np.ones(300) if weighting == "none" else np.random.default_rng(9).integers(0, 4, 300).astype(float)
    scores = scorer.score(np.stack([np.ones(300), weights]))  # a second row proves that rows do not mix
    predicted = scorer.predicted
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, predicted, average="macro", sample_weight=weights, zero_division=0
    )
    assert scores.accuracy[1] == pytest.approx(accuracy_score(labels, predicted, sample_weight=weights))
    assert (scores.precision[1], scores.recall[1], scores.f1[1]) == pytest.approx((precision, recall, f1))
    assert scores.nll[1] == pytest.approx(log_loss(labels, probabilities, sample_weight=weights))
    one_versus_rest = [roc_auc_score(labels == k, probabilities[:, k], sample_weight=weights) for k in range(4)]
    assert scores.class_auc[1] == pytest.approx(one_versus_rest)
    assert scores.auc[1] == pytest.approx(np.mean(one_versus_rest))


def test_weights_count_like_repeated_images() -> None:
    probabilities, labels = answers(images=60)
    weights = np.random.default_rng(2).integers(0, 3, 60)
    weighted = make(probabilities, labels).score(weights[None].astype(float))
    repeated = np.repeat(np.arange(60), weights)
    plain = make(probabilities[repeated], labels[repeated]).score(np.ones((1, len(repeated))))
    for name in ("accuracy", "precision", "recall", "f1", "auc", "ece", "nll", "brier"):
        assert getattr(weighted, name)[0] == pytest.approx(getattr(plain, name)[0]), name


def test_closed_forms_of_a_known_case() -> None:
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.4, 0.6]])
    scores = make(probabilities, np.array([0, 1, 1, 1])).score(np.ones((1, 4)))
    assert scores.accuracy[0] == 0.75
    # Two answers at .9 of which one is right, one at .8 and one at .6 that are right.
    assert scores.ece[0] == pytest.approx((abs(1 - 1.8) + 0.2 + 0.4) / 4)
    assert scores.brier[0] == pytest.approx((0.02 + 1.62 + 0.08 + 0.32) / 4)
    assert scores.auc[0] == pytest.approx(2.5 / 3)


def test_a_certain_and_wrong_answer_keeps_every_figure_finite() -> None:
    scorer = make(np.array([[1.0, 0.0], [1.0, 0.0]], np.float32), np.array([0, 1]))
    found = estimates(scorer, Resampling(scorer.labels, None))
    assert all(np.isfinite([figure.value, figure.low, figure.high]).all() for figure in found.values())


def test_a_class_without_images_is_left_out_of_macro_figures() -> None:
    probabilities, labels = answers(classes=3)
    labels[labels == 2] = 1
    scorer = make(probabilities, labels)
    reports = per_class(scorer)
    assert reports[2].support == 0
    assert reports[2].auc is None
    found = estimates(scorer, Resampling(labels, None))
    assert found["recall"].value == pytest.approx((reports[0].recall + reports[1].recall) / 2)
    assert found["auc"].value == pytest.approx(((reports[0].auc or 0) + (reports[1].auc or 0)) / 2)


def test_one_class_alone_has_no_auc() -> None:
    scorer = make(np.array([[0.9, 0.1], [0.3, 0.7]]), np.array([0, 0]))
    assert "auc" not in estimates(scorer, Resampling(scorer.labels, None))


def test_no_image_is_told_in_a_sentence() -> None:
    with pytest.raises(InvalidRequest, match="no image"):
        make(np.zeros((0, 3)), np.zeros(0, np.int64))


def test_intervals_hold_their_value_and_repeat_with_their_seed() -> None:
    probabilities, labels = answers()
    scorer = make(probabilities, labels)
    found = estimates(scorer, Resampling(labels, None, seed=3))
    assert found == estimates(scorer, Resampling(labels, None, seed=3))
    assert found != estimates(scorer, Resampling(labels, None, seed=4))
    assert set(found) == {"accuracy", "precision", "recall", "f1", "auc", "ece", "nll", "brier"}
    assert all(figure.low <= figure.value <= figure.high for figure in found.values())
    assert found["accuracy"].method == "wilson"
    assert found["auc"].method == "bootstrap"


def test_groups_change_the_method_of_every_interval() -> None:
    probabilities, labels = answers()
    found = estimates(make(probabilities, labels), Resampling(labels, np.arange(300) // 5))
    assert {figure.method for figure in found.values()} == {"cluster-bootstrap"}


def spotless(labels: np.ndarray) -> Scorer:
    """Every image is named rightly, each with another confidence."""
    first = np.linspace(0.6, 0.9, len(labels))
    return make(np.where(labels[:, None] == np.arange(2), first[:, None], 1 - first[:, None]), labels)


def test_no_mistake_in_a_small_sample_is_no_certainty() -> None:
    labels = np.array([0] * 14 + [1] * 6)
    found = estimates(spotless(labels), Resampling(labels, None))
    assert (found["accuracy"].low, found["accuracy"].high) == wilson(20, 20)
    for name in ("precision", "recall", "f1", "auc"):
        assert (found[name].low, found[name].high) == wilson(6, 6), name  # no surer than of the smallest class
        assert (found[name].value, found[name].method) == (1.0, "wilson")
    assert found["nll"].method == "bootstrap"


def test_groups_that_are_equally_good_count_as_many_as_there_are() -> None:
    labels = np.tile([0, 1, 0, 1, 0], 8)
    probabilities = np.array(spotless(labels).probabilities)
    probabilities[::5] = [0.2, 0.8]  # one mistake in each group of five
    found = estimates(make(probabilities, labels), Resampling(labels, np.arange(40) // 5))
    assert found["accuracy"].value == 0.8
    assert (found["accuracy"].low, found["accuracy"].high) == pytest.approx(wilson(6.4, 8))
    assert found["accuracy"].method == "cluster-wilson"
    alone = estimates(spotless(labels), Resampling(labels, np.arange(40) // 5))
    assert (alone["recall"].low, alone["recall"].high) == wilson(8, 8)


def test_one_group_alone_leaves_every_value_possible() -> None:
    probabilities, labels = answers(images=30)
    found = estimates(make(probabilities, labels), Resampling(labels, np.zeros(30, np.int64)))
    assert {(figure.low, figure.method) for figure in found.values()} == {(0.0, "cluster-bootstrap")}
    assert {name: figure.high for name, figure in found.items() if name != "nll"} == {
        "accuracy": 1.0, "precision": 1.0, "recall": 1.0, "f1": 1.0, "auc": 1.0, "ece": 1.0, "brier": 2.0
    }  # fmt: skip
    assert found["nll"].value < found["nll"].high < np.inf


def test_a_class_that_a_replicate_lacks_is_not_one_it_got_wrong() -> None:
    labels = np.array([0, 0, 1, 1])
    scores = spotless(labels).score(np.array([[1.0, 1, 0, 0], [1, 1, 1, 1]]))
    for name in ("precision", "recall", "f1"):
        assert getattr(scores, name).tolist() == [1.0, 1.0], name


@pytest.mark.parametrize("name", ["nll", "auc", "brier"])
def test_bootstrap_intervals_cover_the_truth(name: str) -> None:
    truth = getattr(make(*answers(images=200_000, seed=77)).score(np.ones((1, 200_000))), name)[0]
    covered = 0
    for seed in range(100):
        probabilities, labels = answers(images=150, seed=1000 + seed)
        found = estimates(make(probabilities, labels), Resampling(labels, None, replicates=200, seed=seed))
        covered += found[name].low <= truth <= found[name].high
    assert covered >= 87  # 95 expected; fewer than 87 of 100 has odds under 1 in 1,000


def test_calibration_interval_reaches_down_to_a_calibrated_models_zero() -> None:
    # Resampling pushes the error up, so percentiles would nearly always stay above the truth.
    rng = np.random.default_rng(5)
    reflected = percentiles = 0
    for seed in range(50):
        first = rng.uniform(0.05, 0.95, 400)
        labels = (rng.random(400) > first).astype(np.int64)
        scorer = make(np.stack([first, 1 - first], axis=1), labels)
        resampling = Resampling(labels, None, replicates=200, seed=seed)
        reflected += estimates(scorer, resampling)["ece"].low <= 0.01
        percentiles += percentile(np.concatenate([scorer.score(w).ece for w in resampling.blocks()]))[0] <= 0.01
    assert reflected >= 38
    assert percentiles <= 5


def test_confusion_counts_and_reliability_bins_agree_with_the_labels() -> None:
    probabilities, labels = answers()
    scorer = make(probabilities, labels)
    assert confusion(scorer) == confusion_matrix(labels, scorer.predicted).tolist()
    confidence, accuracy, count = reliability(scorer)
    assert count.sum() == 300
    filled = count > 0
    gaps = np.abs(confidence - accuracy)[filled] * count[filled] / 300
    assert gaps.sum() == pytest.approx(scorer.score(np.ones((1, 300))).ece[0])


def test_roc_is_the_curve_scikit_learn_draws() -> None:
    probabilities, labels = answers(ties=True)
    false, true = roc(make(probabilities, labels), 1)
    expected_false, expected_true, _ = roc_curve(labels == 1, probabilities[:, 1], drop_intermediate=False)
    assert false == pytest.approx(expected_false)
    assert true == pytest.approx(expected_true)


def test_worst_mistakes_are_wrong_and_ordered_by_confidence() -> None:
    probabilities, labels = answers()
    scorer = make(probabilities, labels)
    found = worst(scorer, 10)
    assert len(found) == 10
    assert not scorer.correct[found].any()
    assert (np.diff(scorer.confidence[found]) <= 0).all()
    assert scorer.confidence[found[0]] == scorer.confidence[~scorer.correct].max()


def test_intervals_of_a_usual_test_split_take_seconds() -> None:
    probabilities, labels = answers(images=1900, classes=6)
    started = time.perf_counter()
    estimates(make(probabilities, labels), Resampling(labels, None))
    assert time.perf_counter() - started < 15  # about 1 s alone; others may share the processor
