"""How long each step of the demo takes, and how much of the bare engines' speed training and scoring keep.

    python -m benchmarks.demo [--json FILE]

Training is compared with the same network, optimizer and batches on one tensor that lies in memory already, without
augmentation, mixing or validation; scoring with ONNX Runtime on one array that lies in memory already. The pairs take
turns, and the ratio is the median over the rounds, so that a machine that slows down slows both.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from medloop.bundle import read_bundle
from medloop.cpus import available_cpus
from medloop.engines import open_network
from medloop.nets import Architecture, ServedNetwork, build
from medloop.vision.phantoms import CLASSES, phantom
from medloop_trainer.device import choose_device
from medloop_trainer.loop import Images, fit
from medloop_trainer.recipe import Options, Recipe
from numpy.typing import NDArray

from benchmarks.report import arguments, publish

SIZE = 64
IMAGES = 768
BATCH = 64
ROUNDS = 5


def main() -> None:
    options = arguments(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / ".medloop"
        document = run_demo(home)
        figures = {f"seconds.{name}": value for name, value in document["seconds"].items()}
        pixels = np.stack([phantom(CLASSES[i % 6], i, 0, SIZE) for i in range(IMAGES)])
        figures |= compare_training(pixels) | compare_scoring(pixels, home)
    publish("medloop demo", figures, options.json)


def run_demo(home: Path) -> dict[str, Any]:
    """The JSON of one whole demo from an empty home."""
    command = [sys.executable, "-m", "medloop.cli", "demo", "--ports", "auto", "--exit", "--json"]
    done = subprocess.run(
        command, env={**os.environ, "MEDLOOP_HOME": str(home)}, stdout=subprocess.PIPE, text=True, check=True
    )
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def compare_training(pixels: NDArray[np.uint8]) -> dict[str, float]:
    device = choose_device()
    architecture = Architecture(id="small-resnet", classes=len(CLASSES), channels=1, size=SIZE)
    options = Options(epochs=1, batch_size=BATCH)
    recipe = Recipe.settle(options, architecture=architecture.id, size=SIZE, images=IMAGES, pretrained=None)
    labels = np.arange(IMAGES, dtype=np.int64) % len(CLASSES)
    everything = np.arange(IMAGES, dtype=np.int64)
    images = Images(pixels, labels, everything, everything[:64])

    def ours() -> float:
        network = ServedNetwork(architecture, build(architecture, None), [0.5], [0.25])
        return fit(network, images, recipe, device).images_per_second

    def bare() -> float:
        network = ServedNetwork(architecture, build(architecture, None), [0.5], [0.25])
        network.to(memory_format=torch.channels_last)
        network.train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
        inputs = torch.from_numpy(pixels[:BATCH]).permute(0, 3, 1, 2).float()
        targets = functional.one_hot(torch.from_numpy(labels[:BATCH]), len(CLASSES)).float()

        def step() -> torch.Tensor:
            with torch.autocast(device.name, device.autocast, enabled=device.mixed):
                logits = network.activations(inputs).logits
            loss = functional.cross_entropy(logits.float(), targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return loss

        return _rate(lambda: [step() for _ in range(IMAGES // BATCH)])

    return _compare("training", ours, bare)


def compare_scoring(pixels: NDArray[np.uint8], home: Path) -> dict[str, float]:
    import onnxruntime  # after training, whose threads it would share

    [card] = (home / "bundles").glob("*/bundle.json")
    network = open_network(read_bundle(card.parent), threads=available_cpus())
    session = onnxruntime.InferenceSession(card.with_name("model.onnx"), providers=["CPUExecutionProvider"])
    batches = [pixels[start : start + 256] for start in range(0, IMAGES, 256)]

    def ours() -> float:
        return _rate(lambda: [network.run(batch) for batch in batches])

    def bare() -> float:
        return _rate(lambda: [session.run(None, {"image": batch}) for batch in batches])

    return _compare("scoring", ours, bare)


def _rate(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return IMAGES / (time.perf_counter() - started)


def _compare(name: str, ours: Callable[[], float], bare: Callable[[], float]) -> dict[str, float]:
    ours(), bare()  # warm
    pairs = [(ours(), bare()) for _ in range(ROUNDS)]
    return {
        f"{name}.images_per_second": median(a for a, _ in pairs),
        f"{name}.bare_images_per_second": median(b for _, b in pairs),
        f"{name}.of_bare": median(a / b for a, b in pairs),
    }


if __name__ == "__main__":
    main()
