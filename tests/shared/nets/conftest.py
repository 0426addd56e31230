"""Small untrained networks whose answers differ from image to image, and what it takes to export them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from medloop.bundle import Bundle, Card, Conformal, Pixels
from medloop.nets import Architecture, ServedNetwork, TrainingImages, build, export_bundle
from medloop.vision.phantoms import CLASSES as PHANTOMS
from medloop.vision.phantoms import phantom
from medloop.vision.prepare import PreparationSpec

CLASSES = ("a", "b", "c")


@pytest.fixture(scope="session")
def pictures() -> Callable[[Architecture, int], Pixels]:
    """Phantoms uint8 [n, S, S, C] of all kinds."""

    def make(architecture: Architecture, n: int) -> Pixels:
        grey = np.stack([phantom(PHANTOMS[i % len(PHANTOMS)], i, 5, architecture.size) for i in range(n)])
        return grey.repeat(architecture.channels, axis=3)

    return make


@pytest.fixture(scope="session")
def network(pictures: Callable[[Architecture, int], Pixels]) -> Callable[..., ServedNetwork]:
    """A network with the statistics of real images and a loud head: an untrained one says 1/3 to everything."""

    def make(architecture_id: str = "small-resnet", *, size: int = 32, channels: int = 1) -> ServedNetwork:
        torch.manual_seed(0)
        architecture = Architecture(id=architecture_id, classes=len(CLASSES), channels=channels, size=size)
        made = ServedNetwork(architecture, build(architecture), [0.4], [0.25])
        with torch.no_grad():
            images = torch.from_numpy(pictures(architecture, 24))
            for module in made.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.momentum = 1.0
            made.train()(images)
            made.eval()
            head = made.classifier.head
            logits = head(made(images)[1])
            head.weight /= logits.std(dim=0).mean()
            head.bias.sub_(head(made(images)[1]).mean(dim=0))
            made.temperature.fill_(1.5)
        return made

    return make


@pytest.fixture(scope="session")
def exported(pictures: Callable[[Architecture, int], Pixels]) -> Callable[..., Bundle]:
    """Export a network that has learnt 12 pictures, with `calibration` others."""

    def export(made: ServedNetwork, folder: Path, *, calibration: int = 0) -> Bundle:
        architecture = made.architecture
        images = pictures(architecture, 12)
        mode = "L" if architecture.channels == 1 else "RGB"
        card = Card(
            model="phantoms",
            classes=CLASSES,
            preparation=PreparationSpec(mode=mode, size=architecture.size),
            architecture=architecture.id,
            temperature=float(made.temperature),
            conformal=Conformal(coverage=0.95, threshold=0.9, images=10),
            operating_thresholds={},
            dataset_id="0" * 64,
            run_id="0" * 32,
            git_commit=None,
            seed=0,
            packages={},
        )
        hashes = np.arange(12 * 32, dtype=np.uint8).reshape(12, 32)
        others = pictures(architecture, 12 + calibration)[12:]
        training = TrainingImages(images, np.arange(12) % 3, hashes, others)
        return export_bundle(folder, made, card, training, check=images)

    return export


@pytest.fixture(scope="session")
def bundle(
    network: Callable[..., ServedNetwork],
    exported: Callable[..., Bundle],
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    """One exported small network; tests that change it work on a copy."""
    return exported(network(), tmp_path_factory.mktemp("bundle"), calibration=99)
