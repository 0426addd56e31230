"""The learning rate over a training."""

import math

_FIRST, _LAST = 1 / 25, 1 / 1000  # learning rate at both ends, of its peak


def one_cycle(share: float, warm_up: float = 0.25) -> float:
    """The learning rate as a share of its peak, `share` in [0, 1] of all steps in: a linear rise over the first
    `warm_up`, then half a cosine (Smith & Topin 2019)."""
    if share < warm_up:
        return _FIRST + (1 - _FIRST) * share / warm_up
    down = (share - warm_up) / (1 - warm_up)
    return _LAST + (1 - _LAST) * (1 + math.cos(math.pi * down)) / 2
