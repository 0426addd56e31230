"""The moving average of a network's weights, which is what validation judges and the bundle gets."""

import copy

import torch
from medloop.nets import ServedNetwork
from torch.optim.swa_utils import get_ema_multi_avg_fn

from medloop_trainer.recipe import Recipe


class Average:
    """An exponential moving average (Polyak & Juditsky 1992, as Tan & Le 2019 use it) of `network`.

    The running statistics of batch norms are averaged like the weights, not copied: they belong to the weights of
    their time, and an average of weights is best served by the average of what those weights saw over the same time.
    Counters are copied. In evaluation mode always.
    """

    def __init__(self, network: ServedNetwork, recipe: Recipe) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self._recipe = recipe
        pairs = list(zip(self.network.state_dict().values(), network.state_dict().values(), strict=True))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    def update(self, step: int) -> None:
        """Take in the network as it is after step `step`, counted from 0."""
        own, source = zip(*self._averaged, strict=True)
        update = get_ema_multi_avg_fn(self._recipe.ema_decay_at(step))  # type: ignore[no-untyped-call]
        update(own, source, step)
        with torch.no_grad():
            for mine, theirs in self._copied:
                mine.copy_(theirs)
