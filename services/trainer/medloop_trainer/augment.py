"""Training images are moved, changed and mixed a batch at a time, on the device, after the one preparation of pixels.

One sampling moves every image of a batch by its own amounts. The grid it reads from is added up of a row's and a
column's part, which is less work than torch's `affine_grid`, a product for every pixel. What all this costs beside the
network's passes, `python -m benchmarks.training --only input` measures.
"""

import math

import torch
import torch.nn.functional as functional
from torch import Tensor

from medloop_trainer.mix import Boxes, cutmix, mixup
from medloop_trainer.modality import Moves
from medloop_trainer.recipe import Recipe

_LEAST_ERASED, _MOST_ERASED = 0.02, 0.2  # of the area; up to 0.4 in the paper, which hides whole organs
_LARGEST_ASPECT = 3.3  # of an erased rectangle, as in the paper


class Augmentation:
    """Each image is moved and changed by its own random amounts, then the batch is mixed, by CutMix or by MixUp.

    All random numbers come from torch's global generator on the CPU, and nothing is kept from one call to the next.
    """

    def __init__(self, recipe: Recipe, classes: int) -> None:
        self._recipe = recipe
        self._classes = classes

    def __call__(self, images: Tensor, labels: Tensor, *, mix: bool) -> tuple[Tensor, Tensor]:
        """`images` uint8 [N, C, S, S] and `labels` int64 [N] → float32 [N, C, S, S] in [0, 255], targets [N, K].

        Targets are float32 and sum to 1. Without `mix` they are one-hot; with it, a batch is mixed with the recipe's
        probabilities.
        """
        recipe = self._recipe
        # Sampling, too, may leave the range, by a rounding error.
        pixels = change(move(images.float(), recipe.moves), recipe.moves).clamp_(0, 255)
        targets = functional.one_hot(labels, self._classes).float()
        if not mix:
            return pixels, targets
        choice = float(torch.rand(()))
        if choice < recipe.cutmix_probability:
            return cutmix(pixels, targets, recipe.cutmix_alpha)
        if choice < recipe.cutmix_probability + recipe.mixup_probability:
            return mixup(pixels, targets, recipe.mixup_alpha)
        return pixels, targets


def move(pixels: Tensor, moves: Moves) -> Tensor:
    """Turn, zoom, shift and mirror `pixels` float32 [N, C, S, S]; what comes in over an edge is mirrored there.

    All in one sampling, so that pixels are blurred once.
    """
    if moves.in_place:
        return pixels
    theta = _draw_moves(len(pixels), moves).to(pixels.device, non_blocking=True)
    side = pixels.shape[-1]
    places = (torch.arange(side, device=pixels.device) * 2 + 1) / side - 1  # pixel centres, in [-1, 1]
    along_x, along_y, offset = (theta[:, None, :, axis] for axis in range(3))  # [N, 1, 2] each
    columns = along_x * places[:, None]  # [N, S, 2]
    rows = along_y * places[:, None] + offset
    grid = columns[:, None] + rows[:, :, None]  # [N, S, S, 2]
    return functional.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)


def _draw_moves(count: int, moves: Moves) -> Tensor:
    """float32 [N, 2, 3]: where in the old image each new pixel is found, both in [-1, 1]."""
    turn, zoom, right, down = _draw(4, count)
    angle = math.radians(moves.turn) * turn
    if moves.right_angles:
        angle = angle + math.pi / 2 * torch.randint(4, (count,))
    scale = 1 + moves.zoom * zoom
    cos, sin = scale * angle.cos(), scale * angle.sin()
    across, upside = _draw_signs(count, moves.horizontal_flip), _draw_signs(count, moves.vertical_flip)
    shift = 2 * moves.shift  # the side is 2 long
    rows = [cos * across, -sin * upside, right * shift, sin * across, cos * upside, down * shift]
    return torch.stack(rows, dim=1).view(count, 2, 3)


def change(pixels: Tensor, moves: Moves) -> Tensor:
    """Make `pixels` float32 [N, C, S, S] brighter or darker, steeper or flatter, and erase rectangles."""
    if moves.brightness or moves.contrast:
        light, steep = _draw(2, len(pixels)).to(pixels.device, non_blocking=True)[:, :, None, None, None]
        steep = 1 + moves.contrast * steep
        mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
        pixels = torch.addcmul(mean * (1 - steep) + 255 * moves.brightness * light, pixels, steep)
    return erase(pixels, moves.erase_probability) if moves.erase_probability else pixels


def erase(pixels: Tensor, probability: float) -> Tensor:
    """Fill a rectangle of some images with their own mean colour (Zhong et al. 2020, who fill with noise, which no
    medical image has)."""
    count, (height, width) = len(pixels), pixels.shape[2:]
    area = torch.empty(count).uniform_(_LEAST_ERASED, _MOST_ERASED)
    aspect = torch.empty(count).uniform_(-1, 1).mul_(math.log(_LARGEST_ASPECT)).exp_()
    half_height, half_width = 0.5 * (area * aspect).sqrt() * height, 0.5 * (area / aspect).sqrt() * width
    # An empty box for the images that are spared.
    half_height = half_height * (torch.rand(count) < probability)
    centre = torch.randint(height, (count,)), torch.randint(width, (count,))
    boxes = Boxes.around(centre, (half_height.long(), half_width.long()), height, width)
    mean = pixels.mean(dim=(2, 3), keepdim=True)
    return torch.where(boxes.mask(height, width, pixels.device), mean, pixels)


def _draw(rows: int, count: int) -> Tensor:
    """float32 [rows, count] in [-1, 1)."""
    return torch.rand(rows, count) * 2 - 1


def _draw_signs(count: int, both: bool) -> Tensor:
    return torch.randint(2, (count,)) * 2.0 - 1 if both else torch.ones(count)
