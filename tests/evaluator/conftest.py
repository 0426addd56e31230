"""A small data set of grey squares, and versions of the tiny network registered for it."""

import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from medloop.data.leaks import LeakReport
from medloop.data.manifest import SPLITS, Manifest, Row, dataset_key
from medloop.registry import CHALLENGER, Registry, Version
from medloop.storage.objects import ObjectStore
from medloop.testing import TINY_CLASSES, asgi_client, register_bundle, tiny_bundle
from medloop.vision.decode import decode, pixel_hash
from medloop.vision.encode import encode_png_canonical
from medloop_evaluator.app import create_app
from medloop_evaluator.settings import EvaluatorSettings

MODEL = "tiny"
TEST_IMAGES = 80
RegisterVersion = Callable[..., Version]


def squares(objects: ObjectStore, *, grouped: bool = False, seed: int = 0) -> Manifest:
    """Grey 16 px images, brighter ones mostly `bright`; some of either class lie on the wrong side of the middle."""
    rng = np.random.default_rng(seed)
    rows = []
    for split in SPLITS:
        for index in range(TEST_IMAGES if split == "test" else 8):
            label = TINY_CLASSES[index % 2]
            level = rng.uniform(20, 135) if label == "dark" else rng.uniform(120, 235)
            pixels = np.clip(rng.normal(level, 10, (16, 16, 1)), 0, 255).astype(np.uint8)
            data = encode_png_canonical(pixels)
            digest = hashlib.sha256(data).hexdigest()
            location = f"images/{digest[:2]}/{digest}"
            objects.put(location, data, durable=False)
            group = f"{split}-{index // 8}" if grouped else ""
            rows.append(Row(digest, pixel_hash(decode(data).pixels), label, split, group, "squares", {}, location))
    manifest = Manifest(MODEL, TINY_CLASSES, tuple(rows))
    manifest.save(objects)
    return manifest


@pytest.fixture
def dataset(objects: ObjectStore) -> Manifest:
    return squares(objects)


@pytest.fixture
def newer_dataset(objects: ObjectStore, dataset: Manifest) -> Manifest:
    """Another version of the lineage: other images, which come in groups of eight, and a leak report."""
    manifest = squares(objects, grouped=True, seed=1)
    leaks = LeakReport(distance=2, images=len(manifest.rows), exact=1, near=3, by_split={}, by_class={}, examples=())
    objects.put(dataset_key(manifest.id, "leaks.json"), leaks.to_json().encode())
    return manifest


@pytest.fixture
def register(registry: Registry, dataset: Manifest, tmp_path: Path) -> RegisterVersion:
    """Register a tiny network for `dataset` as the challenger: `bias` 0 is good at it, 3 calls nearly all dark; more
    options are those of `tiny_bundle`."""
    made: list[Version] = []

    def make(bias: float = 0.0, dataset_id: str = dataset.id, **options: Any) -> Version:
        folder = tmp_path / "bundles-to-register" / str(len(made))
        bundle = tiny_bundle(folder, bias=bias, model=MODEL, dataset_id=dataset_id, **options)
        version = register_bundle(registry, bundle)
        registry.set_alias(MODEL, CHALLENGER, version.version)
        made.append(version)
        return version

    return make


@pytest.fixture
async def client(home: Path, tracking_uri: str) -> AsyncIterator[httpx.AsyncClient]:
    async with asgi_client(create_app(EvaluatorSettings())) as opened:
        yield opened
