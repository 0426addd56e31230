"""The networks that are served, made once with a fixed seed: as a MedLoop bundle, and as plain torch weights for peers.

    python -m benchmarks.serving.models FOLDER NAME…

Runs in a process of its own, so that torch is gone again before anything is measured.
"""

import io
import json
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from medloop.vision.encode import encode_png
from medloop.vision.phantoms import CLASSES, phantom
from medloop.vision.prepare import PreparationSpec, prepare
from numpy.typing import NDArray

IMAGES = 64
"""Different image files of a model; half of them JPEG, half PNG."""
_MEAN, _STD = 0.45, 0.25
_LOGIT = 15.0  # of the right class above the others, before shrinkage


@dataclass(frozen=True, slots=True)
class Net:
    kind: Literal["tiny", "resnet18"]
    size: int  # px
    mode: Literal["L", "RGB"]
    seed: int = 0

    @property
    def spec(self) -> PreparationSpec:
        return PreparationSpec(mode=self.mode, size=self.size)


NETS = {
    "tiny64": Net("tiny", 64, "L"),
    "tiny64-next": Net("tiny", 64, "L", seed=1),
    "resnet18_224": Net("resnet18", 224, "RGB"),
    "resnet18_64": Net("resnet18", 64, "RGB"),
}


def registered_name(name: str) -> str:
    """What the model is called in MLflow; versions of one model share it."""
    return name.removesuffix("-next")


def pixels(net: Net, index: int) -> NDArray[np.uint8]:
    """Image `index` of a net's own, uint8 [S, S, C]."""
    planes = [phantom(CLASSES[(index + c) % len(CLASSES)], index, 7, net.size)[..., 0] for c in range(len(net.mode))]
    return np.stack(planes, axis=-1)


@cache
def files(name: str) -> list[tuple[bytes, str]]:
    """The image files of a net, each with its media type."""
    return [encode(pixels(NETS[name], index), index) for index in range(IMAGES)]


def encode(image: NDArray[np.uint8], index: int) -> tuple[bytes, str]:
    """An image file and its media type: JPEG and PNG in turns."""
    if index % 2:
        return encode_png(image), "image/png"
    from PIL import Image  # the library has no JPEG encoder

    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, "JPEG", quality=90)
    return file.getvalue(), "image/jpeg"


def write(folder: Path, name: str) -> None:
    """`folder/name/`: `bundle/`, `net.json` and `weights.pt`."""
    import torch
    from medloop.bundle import Card, Conformal
    from medloop.nets import Architecture, Classifier, ServedNetwork, TrainingImages, export_bundle

    from benchmarks.serving.peers.net import build

    net, target = NETS[name], folder / name
    target.mkdir(parents=True)
    torch.manual_seed(net.seed)
    network = build(net.kind, len(net.mode), len(CLASSES))
    images = np.stack([pixels(net, index) for index in range(IMAGES)])
    _settle(network, images)
    if net.kind == "resnet18":  # the tiny ones stay as they are drawn: two versions of one must answer differently
        sent = np.stack([prepare(image, net.spec) for image, _ in files(name)])
        _teach(network, sent, np.arange(IMAGES) % len(CLASSES))
    torch.save(network.state_dict(), target / "weights.pt")
    card = {"kind": net.kind, "mode": net.mode, "size": net.size, "mean": _MEAN, "std": _STD, "classes": CLASSES}
    (target / "net.json").write_text(json.dumps(card))

    architecture = Architecture(id=net.kind, classes=len(CLASSES), channels=images.shape[-1], size=net.size)
    head = network[2]
    assert isinstance(head, torch.nn.Linear)  # noqa: S101 - as built
    classifier = Classifier(network[0], network[1], head, channels=images.shape[-1], pools_mean=True)
    served = ServedNetwork(architecture, classifier, [_MEAN], [_STD])
    hashes = np.arange(IMAGES * 32, dtype=np.uint64).astype(np.uint8).reshape(IMAGES, 32)
    training = TrainingImages(images, np.arange(IMAGES, dtype=np.int64) % len(CLASSES), hashes)
    document = Card(
        model=registered_name(name).replace("_", "-"),
        classes=CLASSES,
        preparation=net.spec,
        architecture=net.kind,
        temperature=1.0,
        conformal=Conformal(coverage=0.95, threshold=0.9, images=100),
        operating_thresholds={},
        dataset_id="0" * 64,
        run_id="0" * 32,
        git_commit=None,
        seed=net.seed,
        packages={},
    )
    export_bundle(target / "bundle", served, document, training, check=images)


def _settle(network: "torch.nn.Sequential", images: NDArray[np.uint8]) -> None:  # type: ignore[name-defined]  # noqa: F821
    """Let batch normalisation see images, so that random weights still give answers that differ between images."""
    import torch

    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None  # the plain mean over what follows
    with torch.no_grad():
        network.train()
        network((torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - _MEAN) / _STD)
    network.eval()


def _teach(network: "torch.nn.Sequential", images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:  # type: ignore[name-defined]  # noqa: F821
    """Give random features a head that tells the images apart (ridge regression): a lower precision is judged by the
    labels that it changes, and labels that hang on a thousandth say nothing."""
    import torch

    with torch.no_grad():
        features = network[:-1]((torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - _MEAN) / _STD).double()
        mean = features.mean(0)
        centred = features - mean
        wanted = _LOGIT * torch.nn.functional.one_hot(torch.from_numpy(labels), len(CLASSES)).double()
        products = centred @ centred.T
        ridge = products.diagonal().mean() / 4 * torch.eye(len(images))
        weights = centred.T @ torch.linalg.solve(products + ridge, wanted - wanted.mean(0))
        network[-1].weight.copy_(weights.T)
        network[-1].bias.copy_(wanted.mean(0) - mean @ weights)


def main() -> None:
    folder, *names = sys.argv[1:]
    for name in names:
        write(Path(folder), name)


if __name__ == "__main__":
    main()
