"""ImageNet weights for torchvision's architectures: from a file, or from torchvision's hub where it can be reached."""

import logging
import pickle
import re
import urllib.request
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medloop.errors import InvalidRequest

logger = logging.getLogger(__name__)

_PATIENCE = 5.0  # s that a first connection to the hub may take; training waits for it


def load_weights(model: nn.Module, name: str, replaced: str, source: str | Path | None) -> str | None:
    """Fill `model` (torchvision's `name`), but for the layers under the prefix `replaced`; returns where from.

    `source` is None (nothing happens), "auto" (the hub; None is returned, and logged, when it cannot be reached) or a
    file. Raises InvalidRequest for a file that cannot be read or belongs to another architecture.
    """
    if source is None:
        return None
    if source == "auto":
        found = _from_hub(name)
        if found is None:
            return None
        state, origin = found
    else:
        path = Path(source)
        state, origin = _from_file(path), f"file:{path.name}"
    _fill(model, name, replaced, state, origin)
    return origin


def _fill(model: nn.Module, name: str, replaced: str, state: dict[str, Tensor], origin: str) -> None:
    # Old DenseNet checkpoints say norm.1 where the layer is called norm1 today.
    state = {re.sub(r"\.(norm|conv)\.([12])\.", r".\1\2.", key): value for key, value in state.items()}
    trunk = {key: value for key, value in state.items() if not key.startswith(replaced)}
    try:
        missing, unexpected = model.load_state_dict(trunk, strict=False)
    except RuntimeError as exc:  # shapes differ
        raise _wrong_architecture(name, origin) from exc
    # num_batches_tracked came later than some checkpoints, and matters only for momentum=None.
    missing = [key for key in missing if not key.startswith(replaced) and not key.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise _wrong_architecture(name, origin)


def _wrong_architecture(name: str, origin: str) -> InvalidRequest:
    return InvalidRequest(f"The weights in {origin} are not {name}'s; choose the --architecture they belong to.")


def _from_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors import SafetensorError
            from safetensors.torch import load_file

            try:
                return dict(load_file(path))
            except SafetensorError as exc:
                raise InvalidRequest(f"{path.name} is no safetensors file; fetch it again.") from exc
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as exc:
        raise InvalidRequest(f"The weights {path.name} cannot be read: {exc.strerror or exc}.") from exc
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as exc:
        raise InvalidRequest(f"{path.name} holds no plain weights; save the model's state_dict() alone.") from exc
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InvalidRequest(f"{path.name} holds no plain weights; save the model's state_dict() alone.")
    return state


def _from_hub(name: str) -> tuple[dict[str, Tensor], str] | None:
    import torchvision

    weights = torchvision.models.get_model_weights(name).DEFAULT
    cached = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    try:
        if not cached.is_file():
            # torch.hub sets no timeout of its own: ask for the head first.
            request = urllib.request.Request(weights.url, method="HEAD")  # noqa: S310  torchvision's own https address
            urllib.request.urlopen(request, timeout=_PATIENCE).close()  # noqa: S310
        state = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as exc:  # URLError and TimeoutError are OSError; RuntimeError is a wrong hash
        logger.warning("%s trains from scratch: its pretrained weights cannot be fetched (%s)", name, exc)
        return None
    return dict(state), str(weights)
