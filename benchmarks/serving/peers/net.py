"""The network that all peers serve, in eager torch, and the reading of an image: the same in every one of them."""

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

BATCH = 16
"""What those that batch may take together: as many as there are clients."""
BATCH_WAIT_S = 0.005
"""How long a batch may wait for more, where that is fixed; waiting longer would only cost them latency."""


def build(kind: str, channels: int, classes: int) -> nn.Sequential:
    """Trunk, neck and head with random weights; `kind` is tiny or resnet18."""
    if kind == "tiny":
        layers: list[nn.Module] = []
        for width_in, width_out in ((channels, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(width_in, width_out, 3, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(width_out), nn.ReLU()]
        return nn.Sequential(nn.Sequential(*layers), _neck(), nn.Linear(64, classes))
    import torchvision  # takes seconds that the tiny network does not need

    net = torchvision.models.resnet18(num_classes=classes)
    trunk = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2, net.layer3, net.layer4)
    return nn.Sequential(trunk, _neck(), net.fc)


def _neck() -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Model:
    """A network from a folder that `benchmarks.serving.models` wrote."""

    def __init__(self, folder: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        card = json.loads((folder / "net.json").read_text())
        self.classes: list[str] = card["classes"]
        self._mode, self._size = card["mode"], card["size"]
        self._mean, self._std = card["mean"], card["std"]
        self._network = build(card["kind"], len(self._mode), len(self.classes))
        self._network.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
        self._network.eval()
        self.predict([torch.zeros(len(self._mode), self._size, self._size)])

    def decode(self, data: bytes) -> Tensor:
        """An image file → float32 [C, S, S], normalised."""
        return self.tensor(Image.open(io.BytesIO(data)))

    def tensor(self, image: Image.Image) -> Tensor:
        image = image.convert(self._mode)
        if image.size != (self._size, self._size):
            image = image.resize((self._size, self._size), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).reshape(self._size, self._size, -1)
        return (pixels.permute(2, 0, 1).float() / 255.0).sub(self._mean).div(self._std)

    @torch.inference_mode()
    def predict(self, images: Sequence[Tensor]) -> list[list[float]]:
        """Probabilities of K classes for each image."""
        found: list[list[float]] = torch.softmax(self._network(torch.stack(list(images))), dim=1).tolist()
        return found

    def answer(self, probabilities: Sequence[float]) -> dict[str, object]:
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        return {"label": self.classes[best], "probabilities": dict(zip(self.classes, probabilities, strict=True))}


def options() -> argparse.Namespace:
    """What every peer is started with."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    return parser.parse_args()
