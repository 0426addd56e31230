"""Architectures by id, all of one shape: a trunk of convolutions, a neck that pools, one linear head.

So that any of them can be exported, explained and searched for neighbours in the same way: the head's input is the
embedding, and where the neck is nothing but the mean over space, class activation maps (Zhou et al. 2016) are exact.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from medloop.errors import InvalidRequest
from medloop.nets import small_resnet


class Architecture(BaseModel):
    """What `build` needs, and `architecture.json` holds: the id, K classes, C channels and S px of the input."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    id: str
    classes: int = Field(ge=2)
    channels: Literal[1, 3]
    size: int = Field(ge=8, le=1024)


class Activations(NamedTuple):
    """What a forward pass leaves behind, all float32."""

    logits: Tensor  # [N, K]
    embedding: Tensor  # [N, D], the head's input
    feature_map: Tensor  # [N, D', h, w], the trunk's output


class Classifier(nn.Module):
    """A trunk, a neck and a linear head.

    Attributes:
        channels: what the trunk takes; torchvision's take 3, also of grey images (normalisation repeats the one).
        pools_mean: the neck is the mean over space, hence logits are linear in the pooled feature map.
        pretrained: where the weights came from, or None when they are random.
    """

    def __init__(self, trunk: nn.Module, neck: nn.Module, head: nn.Linear, *, channels: int, pools_mean: bool) -> None:
        super().__init__()
        self.trunk, self.neck, self.head = trunk, neck, head
        self.channels = channels
        self.pools_mean = pools_mean
        self.pretrained: str | None = None

    def forward(self, x: Tensor) -> Activations:
        """`x` is float32 [N, channels, S, S], normalised."""
        feature_map = self.trunk(x)
        embedding = self.neck(feature_map)
        return Activations(self.head(embedding), embedding, feature_map)


class Parts(NamedTuple):
    """How a torchvision model comes apart. `head` is the prefix of what our own neck and head replace."""

    trunk: nn.Module
    neck: nn.Module
    width: int  # D, the embedding's
    pools_mean: bool


@dataclass(frozen=True, slots=True)
class TorchvisionEntry:
    """A torchvision model: its name there, the state-dict prefix of the layers we leave behind, and its parts."""

    name: str
    replaced: str
    split: Callable[[Any], Parts]


def build(architecture: Architecture, pretrained: str | Path | None = None) -> Classifier:
    """A network of `architecture`, with random weights or pretrained ones.

    `pretrained` is None, "auto" (torchvision's ImageNet weights from its hub when that answers, else random, which is
    logged) or a file (.pth or .safetensors with torchvision's state dict). Random numbers come from torch's generator.

    Raises:
        InvalidRequest: no such architecture, or a file that holds no weights of it.
    """
    if architecture.id == "small-resnet":
        classifier = _small_resnet(architecture)
        if pretrained not in (None, "auto"):  # no hub has weights of ours
            raise InvalidRequest("small-resnet has no pretrained weights; leave --pretrained out or choose resnet18.")
        return classifier
    entry = _TORCHVISION.get(architecture.id)
    if entry is None:
        raise InvalidRequest(f"There is no architecture {architecture.id!r}; choose one of {', '.join(IDS)}.")
    return _from_torchvision(entry, architecture, pretrained)


def _small_resnet(architecture: Architecture) -> Classifier:
    trunk = small_resnet.trunk(architecture.channels, architecture.size)
    head = nn.Linear(small_resnet.WIDTHS[-1], architecture.classes)
    return Classifier(trunk, _mean_over_space(), head, channels=architecture.channels, pools_mean=True)


def _from_torchvision(entry: TorchvisionEntry, architecture: Architecture, pretrained: str | Path | None) -> Classifier:
    # Here, because importing torchvision takes seconds that the small network does not need.
    import torchvision

    from medloop.nets.pretrained import load_weights

    model = torchvision.models.get_model(entry.name, weights=None)
    origin = load_weights(model, entry.name, entry.replaced, pretrained)
    parts = entry.split(model)
    head = nn.Linear(parts.width, architecture.classes)
    classifier = Classifier(parts.trunk, parts.neck, head, channels=3, pools_mean=parts.pools_mean)
    classifier.pretrained = origin
    return classifier


def _mean_over_space(*then: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *then)


def _split_resnet(model: Any) -> Parts:
    layers = (model.conv1, model.bn1, model.relu, model.maxpool, model.layer1, model.layer2, model.layer3, model.layer4)
    return Parts(nn.Sequential(*layers), _mean_over_space(), model.fc.in_features, True)


def _split_densenet(model: Any) -> Parts:
    trunk = nn.Sequential(model.features, nn.ReLU())
    return Parts(trunk, _mean_over_space(), model.classifier.in_features, True)


def _split_efficientnet(model: Any) -> Parts:
    dropout, head = model.classifier
    return Parts(model.features, _mean_over_space(dropout), head.in_features, True)


def _split_convnext(model: Any) -> Parts:
    norm, flatten, head = model.classifier
    return Parts(model.features, nn.Sequential(model.avgpool, norm, flatten), head.in_features, False)


def _split_vgg(model: Any) -> Parts:
    # Its 120 M fully connected weights are left out for the mean over space, as VGG-GAP does (Zhou et al. 2016): they
    # fit 224 px only, and would make every bundle half a gigabyte.
    return Parts(model.features, _mean_over_space(), 512, True)


_TORCHVISION: Final = {
    "resnet18": TorchvisionEntry("resnet18", "fc.", _split_resnet),
    "resnet50": TorchvisionEntry("resnet50", "fc.", _split_resnet),
    "densenet121": TorchvisionEntry("densenet121", "classifier.", _split_densenet),
    "efficientnet_b0": TorchvisionEntry("efficientnet_b0", "classifier.1.", _split_efficientnet),
    "convnext_tiny": TorchvisionEntry("convnext_tiny", "classifier.2.", _split_convnext),
    "vgg16": TorchvisionEntry("vgg16", "classifier.", _split_vgg),
}

IDS: Final = ("small-resnet", *_TORCHVISION)
