"""A residual network (He et al. 2016) for small images that trains on a CPU.

Its stem brings any size to about 28–47 px with one strided convolution, so that the cost of an image hardly depends on
its size; three blocks of width 64, 128, 256 then halve it three times. 1.5 M weights, 60 M multiply-adds at 64 px.
"""

import torch
from torch import Tensor, nn

WIDTHS = (64, 128, 128, 256)
_STRIDES = (2, 2, 1, 2)
_STEM_WIDTH = 32
_STEM_SIDE = 32  # px that the stem aims at


class Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut, which averages before it widens (He et al. 2019, ResNet-D)."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.shortcut = _shortcut(width_in, width_out, stride)
        # A block begins as its shortcut, which steadies the first steps (Goyal et al. 2017).
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        residual = torch.relu(self.bn1(self.conv1(x)))  # [N, width_out, h / stride, w / stride]
        return torch.relu(self.bn2(self.conv2(residual)) + self.shortcut(x))


def _shortcut(width_in: int, width_out: int, stride: int) -> nn.Module:
    if stride == 1 and width_in == width_out:
        return nn.Identity()
    # ceil_mode: an odd side ends as long as the strided convolution's.
    pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
    return nn.Sequential(pool, nn.Conv2d(width_in, width_out, 1, bias=False), nn.BatchNorm2d(width_out))


def trunk(channels: int, size: int) -> nn.Sequential:
    """Everything before pooling: float32 [N, channels, size, size] → [N, 256, h, w], h ≈ size / 16 at 64 px."""
    stride = max(1, size // _STEM_SIDE)
    kernel = max(3, 2 * stride - 1)
    blocks = [
        Block(width_in, width_out, step)
        for width_in, width_out, step in zip((_STEM_WIDTH, *WIDTHS[:-1]), WIDTHS, _STRIDES, strict=True)
    ]
    return nn.Sequential(
        nn.Conv2d(channels, _STEM_WIDTH, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(_STEM_WIDTH),
        nn.ReLU(),
        *blocks,
    )
