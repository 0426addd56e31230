"""What answering would cost with no server around it: the bare engine, and decoding alone.

Both are measured in CPU time of a process of their own, with the same threads, on the same images.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from medloop.bundle import read_bundle
from medloop.vision.prepare import prepare

SECONDS = 1.5
"""For each configuration that is tried."""


def bare_engine(bundle_folder: Path, images: list[bytes], threads: int, batch: int) -> float:
    """CPU-milliseconds an image of ONNX Runtime on decoded batches of `batch`, at its better setting of spinning."""
    spec = read_bundle(bundle_folder).card.preparation
    pixels = np.stack([prepare(image, spec) for image in images])
    batches = [pixels[start : start + batch] for start in range(0, len(pixels) - batch + 1, batch)]

    def cost(spinning: bool) -> float:
        session = _session(bundle_folder, threads, spinning)
        return _cpu_ms(lambda: [session.run(["probabilities"], {"image": b}) for b in batches], len(batches) * batch)

    return min(cost(False), cost(True))


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
    session, spec = _session(bundle_folder, 1), read_bundle(bundle_folder).card.preparation
    found: list[list[float]] = []
    for image in images:
        (answer,) = session.run(["probabilities"], {"image": prepare(image, spec)[np.newaxis]})
        found += answer.tolist()
    return found


def _session(bundle_folder: Path, threads: int, spinning: bool = True) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    model = (bundle_folder / "model.onnx").read_bytes()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
