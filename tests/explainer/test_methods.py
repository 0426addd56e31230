"""Both methods: exact where the answer is known, complete, independent of company, and leaving no trace."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import pytest
import torch
from medloop.nets import ServedNetwork
from medloop_explainer import expected_gradients, integrated_gradients
from medloop_explainer.network import Network, baseline, probability
from torch import Tensor


class LinearNetwork(Network, Protocol):
    weights: Tensor


Method = Callable[[Network, Tensor, Tensor], Tensor]


def global_state() -> tuple[bytes, int]:
    state = np.random.get_state(legacy=False)["state"]
    return state["key"].tobytes(), state["pos"]


def shap_against_first_two(network: Network, images: Tensor, targets: Tensor) -> Tensor:
    background = torch.stack([torch.full_like(images[0], 40.0), torch.full_like(images[0], 150.0)])
    return expected_gradients.attribute(network, images, targets, background)


@pytest.fixture(params=["integrated-gradients", "shap"])
def method(request: pytest.FixtureRequest) -> Method:
    return {"integrated-gradients": integrated_gradients.attribute, "shap": shap_against_first_two}[request.param]


def test_integrated_gradients_of_a_linear_model_are_weight_times_difference(linear: LinearNetwork) -> None:
    images = torch.rand(3, 1, 8, 8) * 255
    found = integrated_gradients.attribute(linear, images, torch.tensor([1, 1, 0]))
    expected = linear.weights.detach() * (images - 0.4 * 255)
    assert torch.allclose(found[:2], expected[:2], atol=1e-6)
    assert torch.allclose(found[2], -expected[2], atol=1e-6)


def test_expected_gradients_of_a_linear_model_against_one_background_are_exact(linear: LinearNetwork) -> None:
    images = torch.rand(2, 1, 8, 8) * 255
    background = torch.full((1, 1, 8, 8), 30.0)
    found = expected_gradients.attribute(linear, images, torch.tensor([1, 1]), background)
    assert torch.allclose(found, linear.weights.detach() * (images - 30.0), atol=1e-6)


def test_integrated_gradients_add_up_to_the_difference_in_probability(served: ServedNetwork, pixels: Tensor) -> None:
    targets = served.probabilities(pixels).argmax(dim=1)
    values = integrated_gradients.attribute(served, pixels, targets)
    for image, target, value in zip(pixels, targets, values, strict=True):
        before = probability(served, image[None], int(target))
        reference = probability(served, baseline(served, image[None]), int(target))
        assert float(before - reference) != pytest.approx(0, abs=0.005)
        assert float(value.sum()) == pytest.approx(float(before - reference), abs=0.02)


def test_expected_gradients_add_up_to_sampling_noise(served: ServedNetwork, pixels: Tensor) -> None:
    targets = torch.tensor([0, 1, 2])
    background = torch.rand(8, 1, 32, 32, generator=torch.Generator().manual_seed(2)) * 128
    values = expected_gradients.attribute(served, pixels[:3], targets, background)
    for image, target, value in zip(pixels[:3], targets, values, strict=True):
        before = float(probability(served, image[None], int(target)))
        reference = float(probability(served, background, int(target)).mean())
        assert float(value.sum()) == pytest.approx(before - reference, abs=0.1)


def test_what_an_image_gets_does_not_depend_on_the_others(
    served: ServedNetwork, pixels: Tensor, method: Method
) -> None:
    targets = torch.tensor([0, 1])
    together = method(served, pixels[:2], targets)
    assert together.shape == (2, 1, 32, 32)
    assert together.dtype == torch.float32
    alone = method(served, pixels[1:2], targets[1:])
    assert torch.equal(together[1:], alone)


def test_the_same_question_gets_the_same_answer(served: ServedNetwork, pixels: Tensor, method: Method) -> None:
    targets = torch.tensor([1])
    first = method(served, pixels[:1], targets)
    np.random.rand(7)
    assert torch.equal(first, method(served, pixels[:1], targets))


def test_the_network_and_the_callers_state_are_left_alone(
    served: ServedNetwork, pixels: Tensor, method: Method
) -> None:
    parameter = served.classifier.head.weight
    parameter.grad = torch.ones_like(parameter)
    before, images = {name: value.clone() for name, value in served.state_dict().items()}, pixels[:1].clone()
    np.random.seed(3)
    expected = global_state()
    method(served, images, torch.tensor([0]))
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    parameter.grad = None
    assert all(torch.equal(value, before[name]) for name, value in served.state_dict().items())
    assert not served.training
    assert not any(module._forward_hooks or module._backward_hooks for module in served.modules())
    assert torch.equal(images, pixels[:1])
    assert not images.requires_grad
    assert global_state() == expected


def test_shap_draws_otherwise_with_another_seed(served: ServedNetwork, pixels: Tensor) -> None:
    background, targets = pixels[1:], torch.tensor([0])
    values = [expected_gradients.attribute(served, pixels[:1], targets, background, seed) for seed in (0, 1)]
    assert not torch.equal(values[0], values[1])
