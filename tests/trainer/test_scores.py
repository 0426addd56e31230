import numpy as np
import pytest
from medloop_trainer.scores import macro_auc, score
from sklearn.metrics import log_loss, roc_auc_score


def test_scores_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 3)).round(1).astype(np.float32)  # with ties
    labels = rng.integers(0, 3, 200)
    logits[np.arange(200), labels] += 1
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    found = score(logits, labels)
    assert found.loss == pytest.approx(log_loss(labels, probabilities), rel=1e-5)
    assert found.accuracy == pytest.approx((logits.argmax(axis=1) == labels).mean())
    each = [roc_auc_score(labels == k, logits[:, k]) for k in range(3)]
    assert macro_auc(logits, labels) == pytest.approx(np.mean(each))


def test_auc_knows_its_extremes_and_leaves_out_absent_classes() -> None:
    scores = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]])
    assert macro_auc(scores, np.array([0, 1])) == 1.0
    assert macro_auc(scores, np.array([1, 0])) == 0.0
    assert macro_auc(scores, np.array([1, 1])) is None
    assert macro_auc(np.ones((4, 2)), np.array([0, 0, 1, 1])) == 0.5


def test_large_logits_do_not_overflow() -> None:
    assert score(np.array([[1000.0, -1000.0]], np.float32), np.array([1])).loss == pytest.approx(2000)
