"""How far an attribution can be trusted: does it add up, and do the pixels it names matter to the network?

All figures are in probability, in [0, 1] up to sign:

    completeness_gap   |sum of the attributions − (f(image) − f(reference))|; 0 is right
    deletion           area under f(image) while the image is taken away, the patch with the highest attribution
                       first (Petsiuk, Das & Saenko 2018); lower is better
    random_deletion    the same in random order, the mean of some orders
    faithfulness       random_deletion − deletion; at 0 or below, the attribution names no better than chance

What is taken away is replaced by the baseline. Patches rather than pixels, since single missing pixels are noise that
networks react to whatever they show.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from medloop_explainer.network import Network, baseline, probability

_GRID = 16  # patches a side, or pixels where there are fewer
_STEPS = 16  # how often the probability is looked at on the way
_RANDOM_ORDERS = 4


def completeness_gap(values: Tensor, difference: float) -> float:
    """`values` of any shape; `difference` is f(image) − f(baseline), or less its mean over the background."""
    return abs(float(values.double().sum()) - difference)


def deletion(network: Network, image: Tensor, target: int, values: Tensor) -> float:
    """Area under the deletion curve of `image` float32 [C, S, S] by `values` [S, S]."""
    order = torch.argsort(patch_means(values).flatten(), descending=True, stable=True)
    return _area(network, image, target, _patches(image.shape[-1]), order)


def patch_means(values: Tensor) -> Tensor:
    """The mean attribution of each patch, float64 [grid, grid], of `values` [S, S]."""
    patches = _patches(values.shape[-1]).flatten()
    size = torch.bincount(patches)
    total = torch.zeros(len(size), dtype=torch.float64).index_add_(0, patches, values.double().flatten())
    grid = min(_GRID, values.shape[-1])
    return (total / size).reshape(grid, grid)


def random_deletion(network: Network, image: Tensor, target: int, seed: int = 0) -> float:
    """The mean area under the deletion curves of four random orders."""
    generator = torch.Generator().manual_seed(seed)
    patches = _patches(image.shape[-1])
    orders = [torch.randperm(int(patches.max()) + 1, generator=generator) for _ in range(_RANDOM_ORDERS)]
    areas: Sequence[float] = [_area(network, image, target, patches, order) for order in orders]
    return sum(areas) / len(areas)


def _area(network: Network, image: Tensor, target: int, patches: Tensor, order: Tensor) -> float:
    """Trapezoids over the share of patches that is gone, from none to all."""
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    gone = torch.linspace(0, len(order), _STEPS + 1)  # patches gone at each look
    missing = rank[patches][None, None] < gone[:, None, None, None]  # [steps + 1, 1, S, S]
    images = torch.where(missing, baseline(network, image[None]), image[None])
    return float(torch.trapezoid(probability(network, images, target).double(), dx=1 / _STEPS))


def _patches(side: int) -> Tensor:
    """Which patch each pixel belongs to: int64 [S, S]."""
    grid = min(_GRID, side)
    along = torch.arange(side) * grid // side
    return along[:, None] * grid + along[None, :]
