"""Networks whose attributions are known, and a small real one."""

import hashlib
import warnings
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from medloop.bundle import Bundle, Card, Conformal
from medloop.data.manifest import SPLITS, Manifest, Row
from medloop.nets import Architecture, ServedNetwork, TrainingImages, build, export_bundle
from medloop.registry import Registry, Version
from medloop.storage.objects import ObjectStore, open_objects
from medloop.testing import asgi_client, register_bundle
from medloop.vision.decode import decode, pixel_hash
from medloop.vision.encode import encode_png_canonical
from medloop.vision.phantoms import CLASSES as PHANTOMS
from medloop.vision.phantoms import phantom
from medloop.vision.prepare import PreparationSpec
from medloop_explainer.app import create_app
from medloop_explainer.settings import ExplainerSettings
from torch import Tensor, nn

CLASSES = PHANTOMS[:3]


@pytest.fixture(scope="session", autouse=True)
def shap_imported() -> None:
    """shap's plots, which we never draw, call matplotlib in a way that it wants to do away with."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"The set_\w+ function will be deprecated", PendingDeprecationWarning)
        import shap  # noqa: F401


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These networks are too small to share: threads that wait for one another would cost seconds on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Linear(nn.Module):
    """Probabilities that are linear in pixels: class 1 gets 0.5 + Σ weight · (pixel − mean)."""

    def __init__(self, side: int = 8, channels: int = 1) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((channels, 1, 1), 0.4))
        weights = torch.rand(channels, side, side, generator=torch.Generator().manual_seed(0)) - 0.5
        self.weights = nn.Parameter(weights / (255 * side * side))

    def probabilities(self, pixels: Tensor) -> Tensor:
        first = 0.5 + ((pixels - 0.4 * 255) * self.weights).sum(dim=(1, 2, 3))
        return torch.stack([1 - first, first], dim=1)


@pytest.fixture
def linear() -> Linear:
    return Linear()


@pytest.fixture(scope="session")
def served() -> ServedNetwork:
    """A small residual network with random weights, sharpened so that its answers are not all alike."""
    torch.manual_seed(0)
    architecture = Architecture(id="small-resnet", classes=3, channels=1, size=32)
    classifier = build(architecture)
    with torch.no_grad():
        classifier.head.weight *= 8
    return ServedNetwork(architecture, classifier, [0.45], [0.25]).eval()


@pytest.fixture(scope="session")
def pixels() -> Tensor:
    """float32 [5, 1, 32, 32]"""
    return torch.rand(5, 1, 32, 32, generator=torch.Generator().manual_seed(1)) * 255


def _store_phantoms(objects: ObjectStore) -> Manifest:
    rows = []
    for split in SPLITS:
        for index in range(9):
            label = CLASSES[index % 3]
            data = encode_png_canonical(phantom(label, index, SPLITS.index(split), 48))
            digest = hashlib.sha256(data).hexdigest()
            location = f"images/{digest[:2]}/{digest}"
            objects.put(location, data, durable=False)
            rows.append(Row(digest, pixel_hash(decode(data).pixels), label, split, "", "phantoms", {}, location))
    manifest = Manifest("phantoms", CLASSES, tuple(rows))
    manifest.save(objects)
    return manifest


@pytest.fixture
def dataset(objects: ObjectStore) -> Manifest:
    """27 phantoms of three classes and 9 more to train on, 48 px, in this test's object store."""
    return _store_phantoms(objects)


@pytest.fixture(scope="session")
def exported(served: ServedNetwork, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """`served` as a bundle that was trained, it says, on `dataset`."""
    elsewhere = open_objects(tmp_path_factory.mktemp("objects").as_uri())
    images = np.stack([phantom(label, 0, 0, 32) for label in CLASSES])
    card = Card(
        model="phantoms",
        classes=CLASSES,
        preparation=PreparationSpec(mode="L", size=32),
        architecture="small-resnet",
        temperature=1.0,
        conformal=Conformal(coverage=0.95, threshold=0.9, images=9),
        operating_thresholds={},
        dataset_id=_store_phantoms(elsewhere).id,
        run_id="0" * 32,
        git_commit=None,
        seed=0,
        packages={},
    )
    training = TrainingImages(images, np.arange(3), np.zeros((3, 32), np.uint8))
    return export_bundle(tmp_path_factory.mktemp("bundle"), served, card, training)


@pytest.fixture
def version(registry: Registry, exported: Bundle) -> Version:
    return register_bundle(registry, exported)


@pytest.fixture
async def client(home: Path, tracking_uri: str) -> AsyncIterator[httpx.AsyncClient]:
    async with asgi_client(create_app(ExplainerSettings())) as opened:
        yield opened
