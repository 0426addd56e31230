import logging
import re
from pathlib import Path

import pytest
import torch
import torchvision
from medloop.errors import InvalidRequest
from medloop.nets import Architecture, Classifier, build
from safetensors.torch import save_file
from torch import Tensor


def resnet18(pretrained: str | Path | None) -> Classifier:
    torch.manual_seed(1)
    return build(Architecture(id="resnet18", classes=3, channels=1, size=32), pretrained)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(7)
    return dict(torchvision.models.resnet18(weights=None).state_dict())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_fills_all_but_the_head(state: dict[str, Tensor], suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    classifier = resnet18(path)
    assert classifier.pretrained == f"file:weights{suffix}"
    assert torch.equal(classifier.trunk.get_parameter("0.weight"), state["conv1.weight"])
    assert torch.equal(classifier.trunk.get_parameter("7.1.bn2.weight"), state["layer4.1.bn2.weight"])
    assert classifier.head.out_features == 3


def test_old_densenet_names_are_understood(tmp_path: Path) -> None:
    model = torchvision.models.densenet121(weights=None)
    old = {re.sub(r"\.(norm|conv)([12])\.", r".\1.\2.", key): value for key, value in model.state_dict().items()}
    assert old.keys() != model.state_dict().keys()
    torch.save(old, tmp_path / "old.pth")
    classifier = build(Architecture(id="densenet121", classes=2, channels=3, size=32), tmp_path / "old.pth")
    found = classifier.trunk.get_parameter("0.denseblock1.denselayer1.conv2.weight")
    assert torch.equal(found, model.features.denseblock1.denselayer1.conv2.weight)


@pytest.mark.parametrize("other", ["resnet50", "convnext_tiny"])
def test_weights_of_another_architecture_are_refused(other: str, tmp_path: Path) -> None:
    torch.save(torchvision.models.get_model(other, weights=None).state_dict(), tmp_path / "other.pth")
    with pytest.raises(InvalidRequest, match=r"other\.pth are not resnet18's"):
        resnet18(tmp_path / "other.pth")


def test_a_pickled_model_is_not_unpickled(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18(weights=None), tmp_path / "model.pth")
    with pytest.raises(InvalidRequest, match=r"save the model's state_dict\(\) alone"):
        resnet18(tmp_path / "model.pth")


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights", None])
def test_a_file_that_holds_no_weights_is_refused(name: str, content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidRequest, match=name):
        resnet18(tmp_path / name)


def test_the_small_network_has_no_pretrained_weights(tmp_path: Path) -> None:
    architecture = Architecture(id="small-resnet", classes=2, channels=1, size=32)
    assert build(architecture, "auto").pretrained is None
    with pytest.raises(InvalidRequest, match="choose resnet18"):
        build(architecture, tmp_path / "weights.pth")


def test_an_unreachable_hub_means_training_from_scratch_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with caplog.at_level(logging.WARNING):
        assert resnet18("auto").pretrained is None
    assert "resnet18 trains from scratch" in caplog.text


def test_weights_the_hub_gave_before_are_used_again(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    cached = tmp_path / "hub" / "checkpoints" / weights.url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save(state, cached)
    classifier = resnet18("auto")
    assert classifier.pretrained == str(weights)
    assert torch.equal(classifier.trunk.get_parameter("0.weight"), state["conv1.weight"])
