"""A network of a thousand weights, with everything that a step could depend on: norms, dropout, channels last."""

import numpy as np
import torch
from medloop.nets import Architecture, ServedNetwork
from medloop.nets.architectures import Classifier
from medloop.vision.phantoms import CLASSES, phantom
from medloop.vision.prepare import PreparationSpec
from medloop_trainer.checkpoint import About
from medloop_trainer.loop import Images
from medloop_trainer.randomness import seed_weights
from medloop_trainer.recipe import Options, Recipe
from torch import nn

SIZE = 28
ARCHITECTURE = Architecture(id="small-resnet", classes=2, channels=1, size=SIZE)


def tiny_network(seed: int = 0) -> ServedNetwork:
    seed_weights(seed)
    trunk = nn.Sequential(nn.Conv2d(1, 8, 5, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(8, 8, 3))
    neck = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    classifier = Classifier(trunk, neck, nn.Linear(8, 2), channels=1, pools_mean=True)
    return ServedNetwork(ARCHITECTURE, classifier, [0.5], [0.25])


def tiny_images() -> Images:
    """Dark and bright phantoms: 40 to learn from, 12 to choose the epoch by."""
    labels = np.arange(52) % 2
    pixels = np.stack([phantom(CLASSES[i % 3], i, 0, SIZE) // 4 + 120 * label for i, label in enumerate(labels)])
    return Images(pixels.astype(np.uint8), labels, np.arange(40), np.arange(40, 52))


def tiny_recipe(**options: object) -> Recipe:
    chosen = Options.checked(**{"epochs": 2, "batch_size": 10, **options})
    return Recipe.settle(chosen, architecture="small-resnet", size=SIZE, images=40, pretrained=None)


def tiny_about(recipe: Recipe, run_id: str = "a" * 32, checkpoint_steps: int = 3) -> About:
    return About(
        run_id=run_id,
        model="phantoms",
        dataset_id="d" * 64,
        preparation=PreparationSpec(mode="L", size=SIZE),
        architecture=ARCHITECTURE,
        recipe=recipe,
        checkpoint_steps=checkpoint_steps,
        compiled=False,
        device="cpu",
        threads=torch.get_num_threads(),
        packages={},
    )


def equal(one: ServedNetwork, other: ServedNetwork) -> bool:
    """To the bit, batch norms' statistics included."""
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
