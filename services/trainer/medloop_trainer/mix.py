"""Two images in one, and a label that says how much of each: CutMix and MixUp, for whole batches.

Every image is mixed with the one before it in the batch, whose order is random, and has a box or a share of its own.
One for the whole batch, as in the papers' programs, would be cheaper, but little beside the network's passes; and then
one step would see its batch nearly replaced and another hardly touched, where now each sees the whole distribution.
What a single image goes through is the same.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Boxes(NamedTuple):
    """N rectangles in px, int64 [N] each: rows `top` to `bottom` and columns `left` to `right`, without the latter."""

    top: Tensor
    bottom: Tensor
    left: Tensor
    right: Tensor

    @classmethod
    def around(cls, centre: tuple[Tensor, Tensor], half: tuple[Tensor, Tensor], height: int, width: int) -> "Boxes":
        """Boxes of twice `half` (row, column) about `centre`, px, without what lies outside the image."""
        (row, column), (half_height, half_width) = centre, half
        return cls(
            (row - half_height).clamp(min=0),
            (row + half_height).clamp(max=height),
            (column - half_width).clamp(min=0),
            (column + half_width).clamp(max=width),
        )

    def mask(self, height: int, width: int, device: torch.device) -> Tensor:
        """bool [N, 1, height, width]: what lies inside."""
        # One copy to the device instead of four.
        top, bottom, left, right = torch.stack(self).to(device, non_blocking=True)[:, :, None]
        rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
        inside_rows = (rows >= top) & (rows < bottom)  # [N, height]
        inside_columns = (columns >= left) & (columns < right)
        mask: Tensor = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
        return mask

    def share(self, height: int, width: int) -> Tensor:
        """float32 [N]: the share of the image's pixels that lies inside, exactly."""
        area = (self.bottom - self.top) * (self.right - self.left)
        return area / (height * width)


def cutmix(pixels: Tensor, targets: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Paste a box of each image's neighbour at its own place (Yun et al. 2019).

    `pixels` float32 [N, C, H, W] and `targets` float32 [N, K] → the same. A target is the mean of both, weighted by the
    share of pixels that came from each, after the box was cut off at the image's edge.
    """
    height, width = pixels.shape[2:]
    boxes = draw_boxes(len(pixels), height, width, alpha)
    mixed = torch.where(boxes.mask(height, width, pixels.device), pixels.roll(1, 0), pixels)
    own = (1 - boxes.share(height, width)).to(targets.device, non_blocking=True)
    return mixed, _blend(targets, own)


def mixup(pixels: Tensor, targets: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Lay each image's neighbour over it, see-through: λ of itself, λ from Beta(α, α) (Zhang et al. 2018).

    Shapes as for `cutmix`.
    """
    own = _beta(len(pixels), alpha).to(pixels.device, non_blocking=True)
    return torch.lerp(pixels.roll(1, 0), pixels, own[:, None, None, None]), _blend(targets, own)


def draw_boxes(count: int, height: int, width: int, alpha: float) -> Boxes:
    """CutMix's boxes: of 1 − λ of the image's area and its aspect, λ from Beta(α, α), the centre on any pixel."""
    half = 0.5 * torch.sqrt(1 - _beta(count, alpha))
    centre = torch.randint(height, (count,)), torch.randint(width, (count,))
    return Boxes.around(centre, ((half * height).long(), (half * width).long()), height, width)


def _beta(count: int, alpha: float) -> Tensor:
    """float32 [count] from Beta(α, α), by torch's global generator on the CPU, whatever the device."""
    return torch.distributions.Beta(torch.tensor(alpha), torch.tensor(alpha)).sample((count,))


def _blend(targets: Tensor, own: Tensor) -> Tensor:
    return torch.lerp(targets.roll(1, 0), targets, own[:, None])
