"""What answering would cost with no server around it: the bare engine, and decoding alone.

Both are measured in CPU time of a process of their own, with the same threads, on the same images.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from medloop.bundle import read_bundle
from medloop.vision.prepare import prepare

SECONDS = 1.5
"""For each configuration that is tried."""


def bare_engine(bundle_folder: Path, images: list[bytes], threads: int, batch: int) -> float:
    """CPU-milliseconds an image of ONNX Runtime on decoded batches of `batch`, at its better setting of spinning."""
    import onnxruntime as ort

    spec = read_bundle(bundle_folder).card.preparation
    pixels = np.stack([prepare(image, spec) for image in images])
    batches = [pixels[start : start + batch] for start in range(0, len(pixels) - batch + 1, batch)]

    def cost(spinning: str) -> float:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
        session = ort.InferenceSession(
            (bundle_folder / "model.onnx").read_bytes(), options, providers=["CPUExecutionProvider"]
        )
        return _cpu_ms(lambda: [session.run(["probabilities"], {"image": b}) for b in batches], len(batches) * batch)

    return min(cost("0"), cost("1"))


def decoding(bundle_folder: Path, images: list[bytes]) -> float:
    """CPU-milliseconds an image of `medloop.vision.prepare` alone, in one thread."""
    spec = read_bundle(bundle_folder).card.preparation
    return _cpu_ms(lambda: [prepare(image, spec) for image in images], len(images))


def _cpu_ms(work: Callable[[], object], images: int) -> float:
    work()  # warm
    rounds, cpu, until = 0, time.process_time(), time.perf_counter() + SECONDS
    while time.perf_counter() < until or not rounds:
        work()
        rounds += 1
    return 1000 * (time.process_time() - cpu) / (rounds * images)


def probabilities(bundle_folder: Path, images: list[bytes]) -> list[list[float]]:
    """What the bare engine answers to each image alone: what every server's answers are compared with."""
    from medloop.engines import open_network

    bundle = read_bundle(bundle_folder)
    network = open_network(bundle)
    spec = bundle.card.preparation
    found: list[list[float]] = []
    for image in images:
        found += network.run(prepare(image, spec)[np.newaxis]).probabilities.tolist()
    return found
