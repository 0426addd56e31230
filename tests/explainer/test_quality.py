"""Quality figures tell a true attribution from a false one."""

import pytest
import torch
from medloop_explainer.network import baseline
from medloop_explainer.quality import completeness_gap, deletion, patch_means, random_deletion


def corner(pixels: torch.Tensor) -> torch.Tensor:
    """Probability of class 1 is the brightness of the upper left quarter."""
    first = pixels[:, :, :16, :16].mean(dim=(1, 2, 3)) / 255
    return torch.stack([1 - first, first], dim=1)


class Corner:
    mean = torch.zeros(1, 1, 1)

    def probabilities(self, pixels: torch.Tensor) -> torch.Tensor:
        return corner(pixels)


@pytest.fixture
def bright() -> torch.Tensor:
    return torch.full((1, 32, 32), 255.0)


def test_deletion_by_the_true_attribution_beats_chance_and_by_the_false_one_does_not(bright: torch.Tensor) -> None:
    true = torch.zeros(32, 32)
    true[:16, :16] = 1.0
    by_chance = random_deletion(Corner(), bright, 1)
    # A quarter of the patches carries everything: gone after a quarter of the way, the curve's area is 1/8.
    assert deletion(Corner(), bright, 1, true) == pytest.approx(1 / 8, abs=0.01)
    assert by_chance == pytest.approx(0.5, abs=0.05)
    assert deletion(Corner(), bright, 1, -true) == pytest.approx(7 / 8, abs=0.01)


def test_random_deletion_repeats_with_its_seed(bright: torch.Tensor) -> None:
    assert random_deletion(Corner(), bright, 1, seed=5) == random_deletion(Corner(), bright, 1, seed=5)
    assert random_deletion(Corner(), bright, 1, seed=5) != random_deletion(Corner(), bright, 1, seed=6)


@pytest.mark.parametrize("side", [8, 28, 30, 33])
def test_every_side_is_cut_into_patches(side: int) -> None:
    image = torch.full((1, side, side), 255.0)
    assert 0 < deletion(Corner(), image, 1, torch.rand(side, side)) < 1


@pytest.mark.parametrize("side", [8, 28, 64])
def test_patches_keep_the_mean_of_what_they_cover(side: int) -> None:
    values = torch.zeros(side, side)
    values[:4, :4] = 5.0
    means = patch_means(values)
    assert means.shape == (min(side, 16),) * 2
    assert float(means[0, 0]) == 5.0
    assert float(means[-1, -1]) == 0.0
    assert float(patch_means(torch.full((side, side), 0.3))[2, 5]) == pytest.approx(0.3)


def test_completeness_gap_is_what_is_missing() -> None:
    assert completeness_gap(torch.tensor([[0.2, 0.1]]), 0.4) == pytest.approx(0.1)
    assert completeness_gap(torch.tensor([[0.3, 0.1]]), 0.4) == pytest.approx(0.0, abs=1e-6)


def test_the_baseline_is_the_mean_of_training_in_every_channel() -> None:
    class Grey(Corner):
        mean = torch.tensor([0.2, 0.4, 0.6])[:, None, None]

    assert torch.allclose(baseline(Grey(), torch.zeros(2, 1, 4, 4)), torch.tensor(0.4 * 255))
    colour = baseline(Grey(), torch.zeros(2, 3, 4, 4))
    assert colour[1, :, 0, 0].tolist() == pytest.approx([51, 102, 153])
