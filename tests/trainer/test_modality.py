import numpy as np
import pytest
from medloop_trainer.modality import POLICIES, Looks, Moves, choose_moves, explained, look


def test_grey_images_keep_their_sides_and_coloured_ones_have_none() -> None:
    grey, coloured = (choose_moves("auto", Looks(channels)) for channels in (1, 3))
    assert (grey.horizontal_flip, grey.vertical_flip, grey.right_angles) == (False, False, False)
    assert (coloured.horizontal_flip, coloured.vertical_flip, coloured.right_angles) == (True, True, True)


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_values_that_tell_classes_apart_are_left_alone(channels: int) -> None:
    assert choose_moves("auto", Looks(channels, 0.05, 0.05)).brightness > 0
    for measured in (Looks(channels), Looks(channels, 0.9, 0.1), Looks(channels, 0.1, 0.9)):
        moves = choose_moves("auto", measured)
        assert (moves.brightness, moves.contrast) == (0, 0)


def test_a_named_modality_does_not_depend_on_looks() -> None:
    for name, policy in POLICIES.items():
        assert choose_moves(name, Looks(3, 0.0, 0.0)) == choose_moves(name, Looks()) == policy != Moves()


def test_what_a_class_explains_of_brightness_and_contrast() -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(400) % 2
    noise = generator.integers(100, 140, (400, 8, 8, 1))
    assert max(look(noise.astype(np.uint8), labels)[1:]) < 0.05
    brighter = look((noise + 60 * labels[:, None, None, None]).astype(np.uint8), labels)
    assert brighter.brightness > 0.95
    assert brighter.contrast < 0.05
    steeper = look(((noise - 120) * (1 + labels[:, None, None, None]) + 120).astype(np.uint8), labels)
    assert steeper.brightness < 0.05
    assert steeper.contrast > 0.95
    assert look(np.zeros((2, 4, 4, 3), np.uint8), np.arange(2)) == Looks(3, 1.0, 1.0)


def test_a_class_without_images_explains_nothing() -> None:
    assert explained(np.array([1.0, 2.0, 1.0, 2.0]), np.array([0, 0, 2, 2])) == 0
