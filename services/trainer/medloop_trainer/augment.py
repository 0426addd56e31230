"""Training images are moved, turned and mixed a batch at a time, on tensors, after the one preparation of pixels.

Grey values are left alone: in CT they are a measurement. (Changing brightness and contrast by a tenth cost Medical
MNIST 2 % of its accuracy: AbdomenCT was taken for ChestCT.)
"""

import math

import torch
import torch.nn.functional as functional
from torch import Tensor
from torchvision.transforms import v2

from medloop_trainer.recipe import Recipe

# Small enough that a radiologist would still call the picture the same view.
_TURN = math.radians(10)
_ZOOM = 0.1  # relative
_SHIFT = 0.08  # of the side


class Augmentation:
    """Small affine moves for each image, then CutMix for the batch (Yun et al. 2019).

    Random numbers come from torch's global generator.
    """

    def __init__(self, recipe: Recipe, classes: int) -> None:
        self._cutmix = v2.CutMix(alpha=recipe.cutmix_alpha, num_classes=classes)
        self._classes = classes
        self._probability = recipe.cutmix_probability
        self._flip = recipe.moves.horizontal_flip

    def __call__(self, images: Tensor, labels: Tensor, *, mix: bool) -> tuple[Tensor, Tensor]:
        """`images` uint8 [N, C, S, S] and `labels` int64 [N] → float32 [N, C, S, S] in [0, 255], targets [N, K].

        With `mix`, a batch is mixed with the recipe's probability, and its targets are shares of pixels.
        """
        pixels = _move(images.float(), flip=self._flip)
        if mix and torch.rand(()) < self._probability:
            mixed: tuple[Tensor, Tensor] = self._cutmix(pixels, labels)
            return mixed
        return pixels, functional.one_hot(labels, self._classes).float()


def _move(pixels: Tensor, *, flip: bool) -> Tensor:
    """Turn, zoom and shift each of N images by its own small random amount; edges are mirrored."""
    n = len(pixels)
    turn, zoom, right, down = (torch.rand(4, n) * 2 - 1).unbind()
    angle, scale = turn * _TURN, 1 + zoom * _ZOOM
    cos, sin = scale * angle.cos(), scale * angle.sin()
    sign = torch.randint(0, 2, (n,)) * 2.0 - 1 if flip else torch.ones(n)
    # affine_grid spans [-1, 1], so a share of the side counts twice.
    rows = [cos * sign, -sin, right * 2 * _SHIFT, sin * sign, cos, down * 2 * _SHIFT]
    theta = torch.stack(rows, dim=1).view(n, 2, 3).to(pixels.device)
    grid = functional.affine_grid(theta, list(pixels.shape), align_corners=False)
    return functional.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
