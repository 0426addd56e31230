from collections.abc import Callable

import pytest
import torch
from medloop.errors import InvalidRequest
from medloop.nets import Architecture, ServedNetwork, build
from medloop.nets.architectures import IDS
from medloop.nets.small_resnet import trunk
from pydantic import ValidationError

POOLING = [name for name in IDS if name != "convnext_tiny"]  # that one normalises what it has pooled


def test_an_unknown_architecture_is_refused_with_the_choice() -> None:
    with pytest.raises(InvalidRequest, match="small-resnet, resnet18"):
        build(Architecture(id="resnet9000", classes=2, channels=1, size=32))


@pytest.mark.parametrize("field", [{"classes": 1}, {"channels": 2}, {"size": 4}, {"depth": 50}])
def test_a_description_that_makes_no_network_is_refused(field: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        Architecture.model_validate({"id": "small-resnet", "classes": 2, "channels": 1, "size": 32} | field)


@pytest.mark.parametrize(("size", "side"), [(28, 4), (32, 4), (64, 4), (96, 4), (128, 4), (224, 4)])
def test_the_small_network_sees_every_size_at_the_same_scale(size: int, side: int) -> None:
    with torch.inference_mode():
        feature_map = trunk(1, size).eval()(torch.zeros(2, 1, size, size))
    assert feature_map.shape == (2, 256, side, side)


@pytest.mark.parametrize("architecture_id", POOLING)
def test_the_mean_of_a_class_map_and_the_bias_are_the_logit(
    architecture_id: str, network: Callable[..., ServedNetwork]
) -> None:
    made = network(architecture_id, channels=3)
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    with torch.inference_mode():
        probabilities, _, cam = made(images)
    logits = cam.mean(dim=(2, 3)) + made.classifier.head.bias
    torch.testing.assert_close(torch.softmax(logits / made.temperature, dim=1), probabilities, rtol=1e-4, atol=1e-5)


def test_where_logits_are_not_linear_in_pooled_features_there_is_no_map(network: Callable[..., ServedNetwork]) -> None:
    made = network("convnext_tiny")
    with torch.inference_mode():
        outputs = made(torch.zeros(2, 32, 32, 1, dtype=torch.uint8))
    assert [tuple(output.shape) for output in outputs] == [(2, 3), (2, 768)]
