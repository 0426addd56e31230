import numpy as np
import pytest
import torch
from medloop_trainer.device import Device
from medloop_trainer.images import Images
from medloop_trainer.learner import Learner, logits_of
from medloop_trainer.randomness import seed_step
from torch import nn

from .tiny import equal, tiny_network, tiny_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

EVEN = np.array([0.5, 0.5])


def test_what_was_saved_goes_on_as_if_nothing_had_happened(images: Images, device: Device) -> None:
    recipe = tiny_recipe(ema_decay=0.9)
    pixels, labels = images.pixels[:10], images.labels[:10]

    def learn(learner: Learner, steps: range) -> None:
        for step in steps:
            seed_step(0, step)
            learner.step(step, pixels, labels, 0.01, mix=True)

    straight, other = (Learner(tiny_network(), recipe, device, EVEN) for _ in range(2))
    learn(straight, range(3))
    saved = straight.tensors()
    assert all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in saved.values())
    learn(straight, range(3, 6))
    learn(other, range(5))  # elsewhere altogether
    other.restore(saved)
    learn(other, range(3, 6))
    assert equal(straight.network, other.network)
    assert equal(straight.judged, other.judged)
    assert not equal(straight.judged, straight.network)


def test_an_infinite_gradient_counts_as_no_number(images: Images, device: Device) -> None:
    network = tiny_network()
    network.classifier.head.weight.register_hook(lambda gradient: gradient * torch.inf)  # type: ignore[no-untyped-call]
    learner = Learner(network, tiny_recipe(), device, EVEN)
    assert learner.step(0, images.pixels[:10], images.labels[:10], 0.01, mix=False).isnan()


@pytest.mark.parametrize(("adjustment", "lean"), [(0.0, 2.2), (1.0, 0.0)])  # log 9 = 2.2
def test_logit_adjustment_takes_the_shares_out_of_what_is_served(
    adjustment: float, lean: float, device: Device
) -> None:
    recipe = tiny_recipe(logit_adjustment=adjustment, ema_decay=0, label_smoothing=0)
    network = tiny_network()
    network.classifier.trunk[1] = nn.Identity()  # type: ignore[operator]  # a norm has no use for equal images
    learner = Learner(network, recipe, device, np.array([0.9, 0.1]))
    blind = np.zeros((20, 28, 28, 1), np.uint8)  # only the shares can be learnt
    labels = np.repeat([0, 1], [18, 2])
    for step in range(150):
        seed_step(0, step)
        learner.step(step, blind, labels, 0.05 * (1 - step / 150), mix=False)
    logits = logits_of(network, blind[:1], device)[0]
    assert logits[0] - logits[1] == pytest.approx(lean, abs=0.4)
