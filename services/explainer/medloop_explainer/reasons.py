"""Attributions of one image to one class, with their quality. It needs torch, so the API imports it late."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from medloop.bundle import Pixels
from numpy.typing import NDArray
from torch import Tensor, tensor

from medloop_explainer import expected_gradients, integrated_gradients
from medloop_explainer.methods import Method
from medloop_explainer.models import Model, to_tensor
from medloop_explainer.network import baseline, probability
from medloop_explainer.quality import completeness_gap, deletion, patch_means, random_deletion


@dataclass(frozen=True, slots=True)
class Reason:
    """`values` float32 [S, S]: attribution in probability, summed over channels; `patches` [16, 16]: its means over the
    patches that quality is measured on. People are shown these: single pixels flicker with the network's strides, and
    would look like more detail than was judged."""

    method: Method
    values: NDArray[np.float32]
    patches: NDArray[np.float64]
    quality: dict[str, float]


def probabilities(model: Model, pixels: Pixels) -> NDArray[np.float32]:
    """The rebuilt network's answer to one prepared image uint8 [S, S, C]: float32 [K]."""
    answers, _ = model.network.run(pixels[np.newaxis])
    of_image: NDArray[np.float32] = answers[0]
    return of_image


def reasons(model: Model, pixels: Pixels, target: int, methods: Sequence[Method]) -> list[Reason]:
    """Why `model` gives class `target` its probability for one prepared image uint8 [S, S, C].

    SHAP's `background_images` says how many training images it was measured from. At 0 none could be had, and the
    mean intensity stands for them, as in Integrated Gradients.
    """
    image = to_tensor(pixels[np.newaxis])  # [1, C, S, S]
    by_chance = random_deletion(model.network, image[0], target)
    return [_reason(model, image, target, method, by_chance) for method in methods]


def _reason(model: Model, image: Tensor, target: int, method: Method, by_chance: float) -> Reason:
    network, classes = model.network, tensor([target])
    reference = baseline(network, image)
    if method == "integrated-gradients":
        attributed = integrated_gradients.attribute(network, image, classes)
    else:
        if len(model.background):
            reference = to_tensor(model.background)
        attributed = expected_gradients.attribute(network, image, classes, reference)
    values = attributed[0].sum(dim=0)  # [S, S]
    before, after = probability(network, image, target), probability(network, reference, target).mean()
    area = deletion(network, image[0], target, values)
    quality = {
        "completeness_gap": completeness_gap(values, float(before) - float(after)),
        "deletion": area,
        "random_deletion": by_chance,
        "faithfulness": by_chance - area,
    }
    if method == "shap":
        quality["background_images"] = float(len(model.background))
    return Reason(method, values.numpy(), patch_means(values).numpy(), quality)
