"""Answers survive storage, and are held against labels by name."""

import numpy as np
import pytest
from medloop.data.manifest import Manifest, Row
from medloop_evaluator.answers import Answers


def row(number: int, label: str) -> Row:
    return Row(f"{number:064x}", f"{number:064x}", label, "test")


def test_correctness_does_not_depend_on_the_order_of_classes() -> None:
    manifest = Manifest("m", ("a", "b", "c"), (row(0, "a"), row(1, "b"), row(2, "c")))
    rows = np.arange(3)
    one = Answers(rows, np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.2, 0.7]], np.float32), None)
    other = Answers(rows, one.probabilities[:, [2, 0, 1]], None)
    assert one.called_rightly(manifest, ("a", "b", "c")).tolist() == [True, False, True]
    assert other.called_rightly(manifest, ("c", "a", "b")).tolist() == [True, False, True]


def test_a_class_that_the_version_never_learnt_is_simply_wrong() -> None:
    manifest = Manifest("m", ("a", "b", "new"), (row(0, "a"), row(1, "new")))
    answers = Answers(np.arange(2), np.array([[0.9, 0.1], [0.9, 0.1]], np.float32), None)
    assert answers.called_rightly(manifest, ("a", "b")).tolist() == [True, False]


@pytest.mark.parametrize("scores", [None, np.array([0.5, np.finfo(np.float32).max], np.float32)])
def test_answers_come_back_to_the_bit(scores: np.ndarray | None) -> None:
    answers = Answers(np.array([3, 9]), np.random.default_rng(0).random((2, 4), np.float32), scores)
    again = Answers.from_npz(answers.to_npz())
    if scores is None:
        assert again.outlier_scores is None
    else:
        assert again.outlier_scores is not None
        assert np.array_equal(again.outlier_scores, scores)
    assert np.array_equal(again.rows, answers.rows)
    assert again.probabilities.dtype == np.float32
    assert np.array_equal(again.probabilities, answers.probabilities)
