"""The network as it is served: raw pixels in, probabilities out, everything in between inside one module."""

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor, nn

from medloop.bundle import ARCHITECTURE, MAX_PROBABILITY_DIFFERENCE, WEIGHTS, Bundle
from medloop.errors import UntrustedModel
from medloop.nets.architectures import Activations, Architecture, Classifier, build


class ServedNetwork(nn.Module):
    """Normalisation, classifier, temperature and softmax.

    `mean` and `std` (one value, or one a channel of the classifier) are of pixels in [0, 1]. A single grey channel is
    repeated where the classifier takes three. Dividing logits by `temperature` (Guo et al. 2017) leaves their order.
    """

    mean: Tensor  # [1 | 3, 1, 1]
    std: Tensor
    temperature: Tensor  # []

    def __init__(
        self, architecture: Architecture, classifier: Classifier, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.classifier = classifier
        self.register_buffer("mean", _per_channel(mean, classifier.channels))
        self.register_buffer("std", _per_channel(std, classifier.channels))
        self.register_buffer("temperature", torch.tensor(1.0))

    def activations(self, pixels: Tensor) -> Activations:
        """`pixels` float32 [N, C, S, S] in [0, 255], also between the whole numbers."""
        # A mean of three channels makes three of one: [N, 1, S, S] − [3, 1, 1].
        activations: Activations = self.classifier((pixels / 255.0 - self.mean) / self.std)
        return activations

    def probabilities(self, pixels: Tensor) -> Tensor:
        """float32 [N, K] for `pixels` float32 [N, C, S, S] in [0, 255]: what explanations differentiate."""
        return torch.softmax(self.activations(pixels).logits / self.temperature, dim=1)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """`image` uint8 [N, S, S, C] → probabilities [N, K], embedding [N, D] and, where exact, cam [N, K, h, w].

        A class's map is what each place of the feature map adds to its logit, before temperature: its mean over space
        plus the head's bias is the logit.
        """
        logits, embedding, feature_map = self.activations(image.permute(0, 3, 1, 2).float())
        probabilities = torch.softmax(logits / self.temperature, dim=1)
        if not self.classifier.pools_mean:
            return probabilities, embedding
        cam = torch.conv2d(feature_map, self.classifier.head.weight[:, :, None, None])
        return probabilities, embedding, cam

    @classmethod
    def restore(cls, architecture: Architecture, weights: dict[str, Tensor]) -> Self:
        """The network with exactly `weights`; raises RuntimeError when they are another architecture's."""
        classifier = build(architecture)
        unset = [0.0] * classifier.channels
        network = cls(architecture, classifier, unset, unset)
        network.load_state_dict(weights, strict=True)
        return network.eval()

    @torch.inference_mode()
    def run(self, images: NDArray[np.uint8], batch_size: int = 256) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Probabilities f32 [N, K] and embeddings f32 [N, D] of `images` uint8 [N, S, S, C], in evaluation mode."""
        training = self.training
        self.eval()
        found: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(images), batch_size):
            # A copy, since torch warns of memory that it could write to and must not (a read-only memmap).
            batch = torch.from_numpy(np.array(images[start : start + batch_size]))
            outputs = self(batch.to(self.mean.device))
            found.append((outputs[0].cpu(), outputs[1].cpu()))
        self.train(training)
        probabilities, embeddings = zip(*found, strict=True)
        return torch.cat(probabilities).numpy(), torch.cat(embeddings).numpy()


def _per_channel(values: Sequence[float], channels: int) -> Tensor:
    if len(values) not in (1, channels):
        raise ValueError(f"normalisation needs 1 or {channels} values, got {len(values)}")
    return torch.tensor(values, dtype=torch.float32).expand(channels).clone()[:, None, None]


def rebuild(bundle: Bundle) -> ServedNetwork:
    """The bundle's network in torch, in evaluation mode, for explaining and fine-tuning.

    Raises UntrustedModel when the files do not make a network, or one that answers the golden inputs otherwise than
    the registered one (|Δp| > 1e-4).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        architecture = Architecture.model_validate_json((bundle.folder / ARCHITECTURE).read_bytes())
        network = ServedNetwork.restore(architecture, load_file(bundle.folder / WEIGHTS))
    except (OSError, ValidationError, SafetensorError, RuntimeError) as exc:
        raise UntrustedModel("The bundle's weights do not make a network; register the version again.") from exc
    golden = bundle.golden
    difference = float(np.abs(network.run(golden.prepared)[0] - golden.probabilities).max())
    if not difference <= MAX_PROBABILITY_DIFFERENCE:
        raise UntrustedModel(
            f"The rebuilt network's answers to the golden inputs are off by {difference:.1e} "
            f"(at most {MAX_PROBABILITY_DIFFERENCE:.0e} is allowed)."
        )
    return network
