"""The synthetic set: the same on every machine, varied, and out of reach for a linear model."""

import hashlib
from typing import Any

import numpy as np
import pytest
from medloop.vision.phantoms import CLASSES, phantom
from numpy.typing import NDArray

SIDE = 32


@pytest.fixture(scope="module")
def labelled() -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """900 phantoms as rows of pixels in 0–1, [N, S·S], with their classes [N] taking turns."""
    images = [phantom(label, index, 0, SIDE) for index in range(150) for label in CLASSES]
    return np.stack(images).reshape(len(images), -1) / 255.0, np.tile(np.arange(len(CLASSES)), 150)


@pytest.mark.parametrize("label", CLASSES)
@pytest.mark.parametrize("size", [16, 28, 64, 130])
def test_shape_and_contrast(label: str, size: int) -> None:
    image = phantom(label, 0, 0, size)
    assert image.shape == (size, size, 1)
    assert image.dtype == np.uint8
    assert image.std() > 10


def test_six_classes_say_that_they_are_synthetic() -> None:
    assert len(CLASSES) == 6
    assert all(label.startswith("phantom-") for label in CLASSES)


def test_an_image_does_not_depend_on_what_was_drawn_before() -> None:
    forward = [phantom(label, index, 3, SIDE).tobytes() for label in CLASSES for index in range(4)]
    backward = [phantom(label, index, 3, SIDE).tobytes() for label in reversed(CLASSES) for index in reversed(range(4))]
    assert forward == backward[::-1]


def test_pixels_are_the_same_on_every_machine() -> None:
    digest = hashlib.sha256(b"".join(phantom(label, i, 7, 64).tobytes() for label in CLASSES for i in range(20)))
    assert digest.hexdigest()[:16] == "21cedbf80d5bbc3b"


def test_label_index_and_seed_all_matter() -> None:
    drawn = [phantom(label, index, seed, SIDE) for label in CLASSES for index in range(20) for seed in range(3)]
    assert len({image.tobytes() for image in drawn}) == len(drawn)


def test_geometry_is_the_same_at_every_size() -> None:
    for label in CLASSES:
        small = phantom(label, 5, 1, SIDE)[..., 0].astype(float)
        large = phantom(label, 5, 1, 4 * SIDE)[..., 0].astype(float).reshape(SIDE, 4, SIDE, 4).mean(axis=(1, 3))
        # What differs between the two is how edges fall on pixels, and the noise, whose numbers come last.
        assert np.corrcoef(small.ravel(), large.ravel())[0, 1] > 0.9, label


def test_a_linear_model_on_pixels_fails(labelled: tuple[NDArray[np.float64], NDArray[np.intp]]) -> None:
    features, classes = labelled
    scores = [_ridge_accuracy(features, classes, penalty) for penalty in (1e0, 1e1, 1e2, 1e3, 1e4)]
    assert max(scores) < 0.75


def test_the_linear_model_works_where_the_task_is_linear(
    labelled: tuple[NDArray[np.float64], NDArray[np.intp]],
) -> None:
    # Without this the test above could pass for a fault in its model: here each class has one bright pixel of its own.
    features, classes = labelled
    marked = features.copy()
    marked[np.arange(len(classes)), classes] += 5
    assert _ridge_accuracy(marked, classes, 1e2) > 0.95


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chest-ct", 0, 0, 64), "choose one of"),
        ((CLASSES[0], 0, 0, 15), "at least 16"),
        ((CLASSES[0], -1, 0, 64), "non-negative"),
        ((CLASSES[0], 0, -1, 64), "non-negative"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        phantom(*arguments)


def _ridge_accuracy(features: NDArray[np.float64], classes: NDArray[np.intp], penalty: float) -> float:
    """Held-out accuracy of ridge regression on one-hot classes, in its dual form; two thirds train."""
    train = np.arange(len(classes)) < len(classes) * 2 // 3
    centred = (features - features[train].mean(axis=0)) / features[train].std(axis=0)
    targets = np.eye(len(CLASSES))[classes] - 1 / len(CLASSES)
    gram = centred[train] @ centred[train].T
    weights = np.linalg.solve(gram + penalty * np.eye(len(gram)), targets[train])
    predicted = (centred[~train] @ centred[train].T @ weights).argmax(axis=1)
    return float((predicted == classes[~train]).mean())
