"""What the methods ask of a network, and the image they measure from."""

from typing import Protocol

import torch
from torch import Tensor


class Network(Protocol):
    """`medloop.nets.ServedNetwork`, or anything with its probabilities and mean."""

    mean: Tensor
    """Of the training set's pixels in [0, 1]: [C or 1, 1, 1]."""

    def probabilities(self, pixels: Tensor) -> Tensor:
        """float32 [N, K] for float32 [N, C, S, S] in [0, 255]."""
        ...


def baseline(network: Network, images: Tensor) -> Tensor:
    """The training set's mean intensity everywhere, [N, C, S, S]: it says nothing, is neither black nor white (black
    is a finding in many modalities), and the weights hold it, so it is there when the data set is not."""
    mean = network.mean.to(images)
    channels = images.shape[1]
    if mean.shape[0] != channels:
        mean = mean.mean(dim=0, keepdim=True)  # a grey image in a network of three channels
    return (mean * 255).expand_as(images).clone()


@torch.no_grad()
def probability(network: Network, images: Tensor, target: int) -> Tensor:
    """The probability of class `target`, float32 [N]."""
    return network.probabilities(images)[:, target]
