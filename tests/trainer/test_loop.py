from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from medloop.errors import TrainingFailed
from medloop.nets import Architecture, ServedNetwork, build
from medloop.vision.phantoms import CLASSES, phantom
from medloop_trainer.device import Device, choose_device
from medloop_trainer.loop import Epoch, Fit, Images, batches, fit, logits_of, one_cycle
from medloop_trainer.recipe import Options, Recipe
from medloop_trainer.scores import score

SIZE = 28


@pytest.fixture(scope="module")
def device() -> Device:
    return choose_device()


@pytest.fixture(scope="module")
def images() -> Images:
    """Dark and bright phantoms: 40 to learn from, 12 to choose the epoch by."""
    labels = np.arange(52) % 2
    pixels = np.stack([phantom(CLASSES[i % 3], i, 0, SIZE) // 4 + 120 * label for i, label in enumerate(labels)])
    return Images(pixels.astype(np.uint8), labels, np.arange(40), np.arange(40, 52))


def recipe(**options: object) -> Recipe:
    chosen = Options.checked(**{"epochs": 2, "batch_size": 10, **options})
    return Recipe.settle(chosen, architecture="small-resnet", size=SIZE, images=40, pretrained=None)


def trained(images: Images, device: Device, recipe: Recipe, **hooks: Any) -> tuple[ServedNetwork, Fit]:
    torch.manual_seed(recipe.seed)
    architecture = Architecture(id="small-resnet", classes=2, channels=1, size=SIZE)
    network = ServedNetwork(architecture, build(architecture), [0.5], [0.25])
    return network, fit(network, images, recipe, device, **hooks)


def test_the_same_seed_gives_the_same_weights_to_the_bit(images: Images, device: Device) -> None:
    one, other = (trained(images, device, recipe(seed=1))[0].state_dict() for _ in range(2))
    another = trained(images, device, recipe(seed=2))[0].state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(one[name], another[name]) for name in one)


def test_what_differs_is_learnt_and_the_best_epoch_is_kept(images: Images, device: Device) -> None:
    seen: list[Epoch] = []
    calls: list[tuple[str, int, int]] = []
    network, found = trained(
        images, device, recipe(epochs=4), report=seen.append, progress=lambda *call: calls.append(call)
    )
    assert found.best.val.accuracy == 1.0
    assert found.best == min(seen, key=lambda epoch: epoch.judged_by)
    assert tuple(seen) == found.epochs
    assert [epoch.number for epoch in seen] == [1, 2, 3, 4]
    kept = score(logits_of(network, images.pixels[images.val], device), images.labels[images.val])
    assert kept.loss == pytest.approx(found.best.val.loss, rel=1e-6)
    assert calls[-1] == ("training", 160, 160)
    assert found.images_per_second > 0


def test_a_loss_that_is_no_number_stops_the_training(images: Images, device: Device) -> None:
    architecture = Architecture(id="small-resnet", classes=2, channels=1, size=SIZE)
    network = ServedNetwork(architecture, build(architecture), [0.5], [0.25])
    with torch.no_grad():
        network.classifier.head.weight[0, 0] = float("nan")
    with pytest.raises(TrainingFailed, match=r"in epoch 1; choose a smaller --learning-rate than 0\.003"):
        fit(network, images, recipe(), device)


def test_scoring_does_not_depend_on_the_batch(images: Images, device: Device) -> None:
    network, _ = trained(images, device, recipe(epochs=1))
    together = logits_of(network, images.pixels, device)
    alone = np.concatenate([logits_of(network, images.pixels[i : i + 1], device) for i in range(5)])
    np.testing.assert_allclose(together[:5], alone, atol=1e-4)


def test_with_equal_classes_an_epoch_shows_every_image_once(images: Images) -> None:
    parts = list(batches(images, recipe(batch_size=12)))
    assert sorted(np.concatenate(parts).tolist()) == images.train.tolist()
    assert {len(part) for part in parts} <= {13, 14}


def test_rare_classes_are_shown_by_the_square_root_of_their_size() -> None:
    labels = np.repeat([0, 1], [900, 100])
    skewed = Images(np.zeros((1000, 1, 1, 1), np.uint8), labels, np.arange(1000), np.arange(0))
    shown = np.concatenate(list(batches(skewed, recipe())))
    assert len(shown) == 1000
    counts = Counter(labels[shown].tolist())
    assert counts == {0: 750, 1: 250}  # √900 : √100 = 3 : 1
    of_rare = Counter(shown[labels[shown] == 1].tolist())
    assert set(of_rare.values()) == {2, 3}, "all of a rare class, about as often"
    assert max(Counter(shown[labels[shown] == 0].tolist()).values()) == 1


def test_the_learning_rate_rises_and_falls_once() -> None:
    rates = [one_cycle(share) for share in np.linspace(0, 1, 101)]
    peak = int(np.argmax(rates))
    assert rates[peak] == pytest.approx(1)
    assert peak == 25
    assert rates[0] == pytest.approx(1 / 25)
    assert rates[-1] == pytest.approx(1 / 1000)
    assert (np.diff(rates[: peak + 1]) > 0).all()
    assert (np.diff(rates[peak:]) < 0).all()
