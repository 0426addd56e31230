"""CutMix and MixUp for every image, against what they mean and against torchvision's for a batch."""

from typing import Any

import numpy as np
import pytest
import torch
from medloop_trainer.mix import cutmix, draw_boxes, mixup
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import v2

SIDE = 28
DRAWS = 3000
FURTHEST = 0.05
"""Between two empirical distributions of so many draws from one (Kolmogorov-Smirnov, p = 0.001); the seeds are fixed,
so that this is a threshold, not a chance."""


def marked(count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Images in which every pixel tells its image and its place, and a class for each image."""
    places = torch.arange(float(height * width)).view(1, 1, height, width)
    return torch.arange(float(count)).view(-1, 1, 1, 1) * height * width + places, torch.eye(count)


@pytest.mark.parametrize(("count", "height", "width"), [(5, 28, 28), (7, 20, 33), (1, 8, 8)])
def test_every_pixel_comes_from_its_own_place_in_one_of_two_images(count: int, height: int, width: int) -> None:
    torch.manual_seed(0)
    pixels, targets = marked(count, height, width)
    for _ in range(50):
        mixed, weights = cutmix(pixels, targets, 1.0)
        origin = (mixed / (height * width)).long()
        torch.testing.assert_close(mixed % (height * width), pixels % (height * width))
        shares = torch.stack([(origin == k).float().mean(dim=(1, 2, 3)) for k in range(count)], dim=1)
        torch.testing.assert_close(weights, shares, atol=1e-6, rtol=0)
        pasted = (origin != torch.arange(count).view(-1, 1, 1, 1))[:, 0]
        rows, columns = pasted.any(dim=2).sum(dim=1), pasted.any(dim=1).sum(dim=1)
        assert torch.equal(rows * columns, pasted.sum(dim=(1, 2))), "what is pasted is a rectangle"


def torchvision_boxes(alpha: float) -> NDArray[np.int64]:
    """[DRAWS, 4]: top, bottom, left, right, one for each call, as torchvision draws them for a batch."""
    transform, image = v2.CutMix(alpha=alpha, num_classes=2), torch.zeros(1, 1, SIDE, SIDE)
    boxes = [transform.make_params([image])["box"] for _ in range(DRAWS)]
    return np.array([(y1, y2, x1, x2) for x1, y1, x2, y2 in boxes])


def figures(boxes: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    top, bottom, left, right = boxes.T
    height, width = bottom - top, right - left
    return {
        "label weight": 1 - height * width / SIDE**2,
        "height": height,
        "width": width,
        "row of the centre": (top + bottom) / 2,
        "column of the centre": (left + right) / 2,
        "cut off": (height != width).astype(float),
    }


def distance(one: NDArray[Any], other: NDArray[Any]) -> float:
    """The largest difference between two empirical distribution functions."""
    places = np.concatenate([one, other])
    heights = [np.searchsorted(np.sort(values), places, side="right") / len(values) for values in (one, other)]
    return float(np.abs(heights[0] - heights[1]).max())


@pytest.mark.parametrize("alpha", [0.3, 1.0, 5.0])
def test_boxes_are_distributed_as_torchvisions(alpha: float) -> None:
    torch.manual_seed(1)
    ours = figures(np.stack(draw_boxes(DRAWS, SIDE, SIDE, alpha), axis=1))
    theirs = figures(torchvision_boxes(alpha))
    for name, values in ours.items():
        assert distance(values, theirs[name]) < FURTHEST, name


def test_without_the_edge_the_weight_is_beta_distributed() -> None:
    """Boxes that the edge did not cut off have λ's own area; at 1,000 px rounding hardly matters."""
    torch.manual_seed(0)
    boxes = draw_boxes(20_000, 1000, 1000, 2.0)
    whole = (boxes.top > 0) & (boxes.bottom < 1000) & (boxes.left > 0) & (boxes.right < 1000)
    half = (boxes.bottom - boxes.top)[whole] / 2000
    # A half side h is left whole by (1 − 2h)² of all centres, which is undone by that weight.
    weights = 1 / (1 - 2 * half).square()
    drawn = 1 - 4 * half.square()
    for power, expected in ((1, 1 / 2), (2, 3 / 10)):  # the moments of Beta(2, 2)
        assert float((weights * drawn**power).sum() / weights.sum()) == pytest.approx(expected, rel=0.05)


def test_mixup_weighs_pixels_and_labels_alike() -> None:
    torch.manual_seed(0)
    count = 2000
    pixels, targets = torch.rand(count, 1, 4, 4) * 255, torch.eye(count)
    mixed, weights = mixup(pixels, targets, 0.4)
    itself = torch.arange(count)
    own, other = weights[itself, itself], weights[itself, itself.roll(1)]
    torch.testing.assert_close(own + other, torch.ones(count))
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(count))
    expected = own[:, None, None, None] * pixels + other[:, None, None, None] * pixels.roll(1, 0)
    torch.testing.assert_close(mixed, expected, atol=1e-3, rtol=0)
    assert distance(own.numpy(), np.random.default_rng(0).beta(0.4, 0.4, 100_000)) < FURTHEST
