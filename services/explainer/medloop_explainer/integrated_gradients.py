"""Integrated Gradients (Sundararajan, Taly & Yan 2017), with Captum.

The attribution of a pixel is its difference to the baseline times the mean gradient on the straight way from there to
the image; all of them sum to the difference in probability (completeness). Caveats: the straight way passes images
that nobody has seen, and what equals the baseline gets nothing.
"""

import torch
from torch import Tensor

from medloop_explainer.network import Network, baseline

_STEPS = (32, 64, 128, 256)
"""Points on the way, tried in turn until the sum is right to within the tolerance; the last is taken as it is."""
TOLERANCE = 0.01  # probability
_BATCH = 32  # points that are differentiated at once


def attribute(network: Network, images: Tensor, targets: Tensor) -> Tensor:
    """Attributions float32 [N, C, S, S], in probability, of `images` float32 [N, C, S, S] in [0, 255] to the classes
    `targets` int64 [N].

    The baseline is the training set's mean intensity everywhere. Images are treated one by one, so what an image gets
    does not depend on the others. The network keeps its gradients, hooks and mode.
    """
    return torch.cat([_one(network, image[None], target) for image, target in zip(images, targets, strict=True)])


def _one(network: Network, image: Tensor, target: Tensor) -> Tensor:
    from captum.attr import IntegratedGradients  # seconds: not while the service starts

    # A bound method, so that Captum sees a function and touches no module.
    method = IntegratedGradients(network.probabilities)
    attributed, gap = image, image  # replaced in the first round
    for steps in _STEPS:
        attributed, gap = method.attribute(
            image.clone().requires_grad_(),
            baselines=baseline(network, image),
            target=int(target),
            n_steps=steps,
            internal_batch_size=_BATCH,
            return_convergence_delta=True,
        )
        if float(gap.abs()) <= TOLERANCE:
            break
    return attributed.detach().float()
