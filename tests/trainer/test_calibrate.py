import numpy as np
import pytest
from medloop_trainer.calibrate import calibrate, conformal, find_temperature, youden_threshold
from medloop_trainer.scores import log_softmax
from numpy.typing import NDArray


def drawn(n: int, k: int = 4, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits and labels drawn from exactly the probabilities those logits mean."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (n, k))
    probabilities = np.exp(log_softmax(logits))
    labels = (probabilities.cumsum(axis=1) > rng.random((n, 1))).argmax(axis=1)
    return logits.astype(np.float32), labels


@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_the_temperature_undoes_a_known_one(true: float) -> None:
    logits, labels = drawn(20_000)
    assert find_temperature(logits * np.float32(true), labels) == pytest.approx(true, rel=0.05)


def test_the_temperature_is_that_of_the_closed_form_for_two_equal_margins() -> None:
    # With logits (m, 0) for all, 3 of 4 rightly called: p = 3/4, so m / T = log 3.
    n, margin = 40_000, 2.5
    logits = np.tile(np.array([margin, 0.0], np.float32), (n, 1))
    labels = (np.arange(n) % 4 == 0).astype(np.int64)
    assert find_temperature(logits, labels) == pytest.approx(margin / np.log(3), rel=1e-3)


def test_tiny_or_faultless_splits_give_sane_temperatures() -> None:
    assert find_temperature(np.zeros((0, 3), np.float32), np.zeros(0, np.int64)) == 1.0
    right = np.eye(3, dtype=np.float32) * 20
    assert 0.1 <= find_temperature(right, np.arange(3)) <= 1.0
    assert 1.0 <= find_temperature(right, np.array([1, 2, 0])) <= 10.0


def test_a_temperature_is_a_float32_so_that_card_and_graph_agree() -> None:
    found = find_temperature(*drawn(50))
    assert found == float(np.float32(found))


def test_prediction_sets_cover_new_images_as_promised() -> None:
    logits, labels = drawn(40_000)
    probabilities = np.exp(log_softmax(logits))
    rates = []
    for start in range(0, 10_000, 100):  # 100 calibration splits of 100 images
        part = slice(start, start + 100)
        threshold = conformal(probabilities[part], labels[part]).threshold
        rest = slice(10_000, None)
        true = probabilities[rest][np.arange(30_000), labels[rest]]
        rates.append((true >= 1 - threshold).mean())
    # Expectation over splits lies in [.95, .95 + 1/101]; 100 splits leave a standard error of about 0.002.
    assert 0.944 <= float(np.mean(rates)) <= 0.966


def test_the_threshold_is_the_corrected_quantile() -> None:
    # Scores .01, .02, … .99 of 99 images: rank ⌈100 · .95⌉ = 95.
    true = 1 - np.arange(1, 100) / 100
    found = conformal(np.stack([true, 1 - true], axis=1), np.zeros(99, np.int64))
    assert found.threshold == pytest.approx(0.95, abs=1e-6)
    assert found.images == 99


def test_the_image_that_set_the_threshold_is_covered() -> None:
    true = np.random.default_rng(0).random(199).astype(np.float32)
    found = conformal(np.stack([true, 1 - true], axis=1), np.zeros(199, np.int64))
    assert (true >= 1 - found.threshold).sum() == 190


@pytest.mark.parametrize("n", [0, 1, 18])
def test_too_few_images_rule_nothing_out(n: int) -> None:
    found = conformal(np.full((n, 2), 0.5), np.zeros(n, np.int64))
    assert (found.threshold, found.images) == (1.0, n)


def test_nineteen_images_are_enough_for_95_per_cent() -> None:
    assert conformal(np.tile([0.9, 0.1], (19, 1)), np.zeros(19, np.int64)).threshold == pytest.approx(0.1, abs=1e-6)


def test_the_operating_threshold_parts_what_can_be_parted() -> None:
    probabilities = np.array([0.05, 0.1, 0.3, 0.7, 0.8])
    assert youden_threshold(probabilities, np.array([False, False, False, True, True])) == pytest.approx(0.5)


def test_the_operating_threshold_maximises_sensitivity_plus_specificity() -> None:
    rng = np.random.default_rng(0)
    positive = rng.random(300) < 0.3
    probabilities = np.clip(rng.normal(0.4 + 0.2 * positive, 0.15), 0, 1)

    def gain(threshold: float) -> float:
        called = probabilities > threshold
        return float(called[positive].mean() + (~called)[~positive].mean())

    found = youden_threshold(probabilities, positive)
    assert gain(found) == pytest.approx(max(gain(t) for t in np.linspace(0, 1, 2001)), abs=1e-9)


@pytest.mark.parametrize("positive", [[True, True], [False, False]])
def test_a_class_that_is_missing_keeps_one_half(positive: list[bool]) -> None:
    assert youden_threshold(np.array([0.2, 0.9]), np.array(positive)) == 0.5


def test_equal_probabilities_keep_one_half() -> None:
    assert youden_threshold(np.array([0.3, 0.3]), np.array([True, False])) == 0.5


def test_an_empty_calibration_split_promises_nothing() -> None:
    found = calibrate(np.zeros((0, 2), np.float32), np.zeros(0, np.int64), ["a", "b"])
    assert found.temperature == 1.0
    assert found.conformal.threshold == 1.0
    assert found.operating_thresholds == {"a": 0.5, "b": 0.5}
