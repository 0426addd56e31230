"""From a trained network to a bundle: written, compared with ONNX Runtime, and only then sealed."""

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medloop.bundle import (
    ARCHITECTURE,
    GOLDEN,
    MAX_PROBABILITY_DIFFERENCE,
    MLMODEL,
    MODEL,
    REFERENCE,
    WEIGHTS,
    Bundle,
    Card,
    Golden,
    Pixels,
    write_card,
)
from medloop.cpus import available_cpus
from medloop.engines import Network, open_network
from medloop.errors import TrainingFailed
from medloop.nets.network import ServedNetwork
from medloop.outliers import fit
from medloop.vision.golden import awkward_images
from medloop.vision.phantoms import CLASSES, phantom
from medloop.vision.prepare import PreparationSpec, prepare, prepare_pixels

REFERENCE_IMAGES = 20_000
"""At most this many training images stand in `reference.npz`: neighbours and drift need no more."""

_BATCH = 256


@dataclass(frozen=True, slots=True)
class TrainingImages:
    """Images the network has learnt from: `images` uint8 [N, S, S, C], `labels` int64 [N], `hashes` uint8 [N, 32]
    (SHA-256 of the stored bytes). `calibration` uint8 [M, S, S, C] are others of the same source that it has not, by
    which the bundle knows how far is far."""

    images: Pixels
    labels: NDArray[np.int64]
    hashes: Pixels
    calibration: Pixels | None = None


def export_bundle(
    folder: Path, network: ServedNetwork, card: Card, training: TrainingImages, check: Pixels | None = None
) -> Bundle:
    """Write `network` as a bundle into the empty `folder`, sealed by `card` (its `files` are filled in here).

    `check` are real images uint8 [N, S, S, C], N ≥ 1, on which ONNX Runtime and torch are compared besides the golden
    ones.

    Raises:
        ValueError: the card speaks of another architecture, temperature, preparation or number of classes.
        TrainingFailed: ONNX Runtime and torch disagree (|Δp| > 1e-4), or an answer is not finite.
    """
    _compare_card(network, card)
    network = network.cpu().eval()
    folder.mkdir(parents=True, exist_ok=True)
    _write_onnx(folder / MODEL, network)
    _write_weights(folder, network)
    _write_mlmodel(folder / MLMODEL, network, card)
    golden = _golden(network, card.preparation)
    golden.save(folder / GOLDEN)

    session = open_network(Bundle(folder, card, digest=""), threads=available_cpus())
    check_agreement(session, golden.prepared, golden.probabilities)
    if check is not None:
        check_agreement(session, check, network.run(check)[0])
    _write_reference(folder / REFERENCE, session, training, len(card.classes))
    return write_card(folder, card)


def check_agreement(session: Network, images: Pixels, expected: NDArray[np.float32]) -> float:
    """Raise TrainingFailed unless ONNX Runtime gives `expected` f32 [N, K] within 1e-4; returns the largest |Δp|."""
    found = np.concatenate([session.run(batch).probabilities for batch in _batches(images)])
    difference = float(np.abs(found - expected).max())
    if not difference <= MAX_PROBABILITY_DIFFERENCE:  # also where it is not a number
        raise TrainingFailed(
            f"The exported network answers otherwise than the trained one (|Δp| = {difference:.1e}); "
            "choose another --architecture or a smaller --learning-rate."
        )
    return difference


def _compare_card(network: ServedNetwork, card: Card) -> None:
    architecture = network.architecture
    of_network = (
        architecture.id,
        architecture.classes,
        architecture.size,
        architecture.channels,
        float(network.temperature),
    )
    spec = card.preparation
    of_card = (card.architecture, len(card.classes), spec.size, spec.channels, card.temperature)
    if of_network != of_card:
        raise ValueError(f"the card says {of_card}, the network is {of_network}")


def _write_onnx(path: Path, network: ServedNetwork) -> None:
    architecture = network.architecture
    # Two images, since torch takes an axis of length 1 for a constant.
    example = torch.zeros(2, architecture.size, architecture.size, architecture.channels, dtype=torch.uint8)
    names = ["probabilities", "embedding", "cam"]
    program = torch.onnx.export(
        network.to(memory_format=torch.contiguous_format),
        (example,),
        input_names=["image"],
        output_names=names if network.classifier.pools_mean else names[:2],
        dynamic_shapes={"image": {0: torch.export.Dim("n")}},
        dynamo=True,
        verbose=False,
    )
    if program is None:
        raise TrainingFailed("The network cannot be written as ONNX; choose another --architecture.")
    program.save(path, external_data=False)


def pack_weights(network: ServedNetwork) -> bytes:
    """What `weights.safetensors` of the network's bundle holds: equal weights give equal bytes."""
    from safetensors.torch import save

    # safetensors writes plain memory order only, and training leaves channels last.
    weights = {name: value.cpu().contiguous() for name, value in network.state_dict().items()}
    packed: bytes = save(weights)
    return packed


def _write_weights(folder: Path, network: ServedNetwork) -> None:
    (folder / WEIGHTS).write_bytes(pack_weights(network))  # save_file would make it readable for its owner only
    document = network.architecture.model_dump(mode="json")
    (folder / ARCHITECTURE).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def _write_mlmodel(path: Path, network: ServedNetwork, card: Card) -> None:
    """MLflow's description of the folder, as JSON (which is YAML): its ONNX flavour, nothing that unpickles."""
    import onnx

    a, classes = network.architecture, len(card.classes)
    document = {
        "run_id": card.run_id,
        "utc_time_created": f"{card.created_at:%Y-%m-%d %H:%M:%S.%f}",
        "flavors": {
            "python_function": {
                "loader_module": "mlflow.onnx",
                "data": MODEL,
                "python_version": platform.python_version(),
            },
            "onnx": {"onnx_version": onnx.__version__, "data": MODEL, "providers": ["CPUExecutionProvider"]},
        },
        "signature": {
            "inputs": json.dumps([_tensor("image", "uint8", [-1, a.size, a.size, a.channels])]),
            "outputs": json.dumps([_tensor("probabilities", "float32", [-1, classes])]),
        },
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def _tensor(name: str, dtype: str, shape: list[int]) -> dict[str, Any]:
    return {"name": name, "type": "tensor", "tensor-spec": {"dtype": dtype, "shape": shape}}


def _golden(network: ServedNetwork, spec: PreparationSpec) -> Golden:
    encoded = awkward_images(spec.size)
    pixels = np.stack([prepare(data, spec) for data in encoded])
    phantoms = [prepare_pixels(phantom(label, 0, 0, spec.size), spec) for label in CLASSES]
    noise = np.random.default_rng(0).integers(0, 256, (4, *pixels.shape[1:]), dtype=np.uint8)
    prepared = np.concatenate([pixels, np.stack(phantoms), noise])
    return Golden(encoded, pixels, prepared, network.run(prepared)[0])


def _write_reference(path: Path, session: Network, training: TrainingImages, classes: int) -> None:
    embeddings = _embeddings(session, training.images)
    calibration = None if training.calibration is None else _embeddings(session, training.calibration)
    outliers = fit(embeddings, training.labels, classes, calibration)
    np.savez(
        path,
        allow_pickle=False,
        embeddings=embeddings.astype(np.float16),
        labels=training.labels,
        hashes=training.hashes,
        **(outliers.to_arrays() if outliers else {}),
    )


def _embeddings(session: Network, images: Pixels) -> NDArray[np.float32]:
    """f32 [N, D], N ≥ 0."""
    found = [session.run(batch).embedding for batch in _batches(images)]
    return np.concatenate(found) if found else np.zeros((0, 1), np.float32)


def _batches(images: Pixels) -> Sequence[Pixels]:
    return [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)]
