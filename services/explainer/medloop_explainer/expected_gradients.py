"""SHAP values by expected gradients (Erion et al. 2021), with shap's GradientExplainer.

As Integrated Gradients, but averaged over many baselines drawn from background images, so that no single one decides
what counts as absent: the values approximate SHAP values (Lundberg & Lee 2017) and sum, up to sampling noise, to the
probability less its mean over the background.
"""

import threading

import numpy as np
import torch
from torch import Tensor, nn

from medloop_explainer.network import Network

SAMPLES = 128
_BATCH = 32  # points that are differentiated at once
_RANDOM = threading.Lock()


def attribute(network: Network, images: Tensor, targets: Tensor, background: Tensor, seed: int = 0) -> Tensor:
    """Attributions float32 [N, C, S, S], in probability, of `images` float32 [N, C, S, S] in [0, 255] to the classes
    `targets` int64 [N], against `background` float32 [M, C, S, S].

    The same seed is used for every image, so what an image gets does not depend on the others. The network keeps its
    gradients, hooks and mode; NumPy's global random state is as it was before.
    """
    return torch.cat(
        [
            _one(network, image[None], int(target), background, seed)
            for image, target in zip(images, targets, strict=True)
        ]
    )


def _one(network: Network, image: Tensor, target: int, background: Tensor, seed: int) -> Tensor:
    from shap import GradientExplainer  # seconds: not while the service starts

    explainer = GradientExplainer(_OneOutput(network, target), background, batch_size=_BATCH)
    # shap draws from NumPy's global generator, which two threads must not share meanwhile.
    with _RANDOM:
        state = np.random.get_state()
        try:
            values = explainer.shap_values(image, nsamples=SAMPLES, rseed=seed)  # [1, C, S, S, 1]
        finally:
            np.random.set_state(state)
    return torch.from_numpy(np.asarray(values, np.float32)[..., 0])


class _OneOutput(nn.Module):
    """One class of a network, [N, 1]: shap would explain every class of it, K times the work."""

    def __init__(self, network: Network, target: int) -> None:
        super().__init__()
        # Not registered as a child: shap clears gradients and changes the mode of what it is given.
        self._ask = network.probabilities
        self._target = target

    def forward(self, pixels: Tensor) -> Tensor:
        return self._ask(pixels)[:, self._target : self._target + 1]
