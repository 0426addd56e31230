"""What a step of training costs when its input costs nothing: one batch, as a tensor, that is there already."""

import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as functional
from medloop.nets import Architecture, ServedNetwork, build
from medloop_trainer.average import Average
from medloop_trainer.device import Device
from medloop_trainer.randomness import seed_weights
from medloop_trainer.recipe import Recipe
from numpy.typing import NDArray
from torch import nn

_LARGEST_GRADIENT = 2.0  # norm, as the trainer's


def network(architecture: Architecture, seed: int = 0) -> ServedNetwork:
    """One that nobody has trained."""
    seed_weights(seed)
    return ServedNetwork(architecture, build(architecture, None), [0.5], [0.25])


class Bare:
    """The same network, precision, memory order and optimizer as the trainer's on one batch, uint8 [B, S, S, C].

    `whole` adds what the trainer's step does beside its input: clipping, and the average of the weights.
    """

    def __init__(
        self,
        architecture: Architecture,
        recipe: Recipe,
        device: Device,
        pixels: NDArray[np.uint8],
        *,
        whole: bool,
    ) -> None:
        self._network = network(architecture)
        self._network.to(device.name, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._network.train()
        self._average = Average(self._network, recipe) if whole else None
        self._device = device
        self._optimizer = torch.optim.AdamW(self._network.parameters(), lr=recipe.learning_rate, fused=True)
        # Of channels last in memory, as images are.
        self._inputs = torch.from_numpy(np.array(pixels)).to(device.name).permute(0, 3, 1, 2).float()
        labels = torch.arange(len(pixels), device=device.name) % architecture.classes
        self._targets = functional.one_hot(labels, architecture.classes).float()
        self._done = 0

    def __call__(self, steps: int) -> float:
        """Seconds of so many steps."""
        return timed(lambda: [self._step() for _ in range(steps)])

    def _step(self) -> float:
        device = self._device
        with torch.autocast(device.name, device.autocast, enabled=device.mixed):
            logits = self._network.activations(self._inputs).logits
        loss = functional.cross_entropy(logits.float(), self._targets)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if self._average is not None:
            nn.utils.clip_grad_norm_(self._network.parameters(), _LARGEST_GRADIENT)
        self._optimizer.step()
        if self._average is not None:
            self._average.update(self._done)
        self._done += 1
        return float(loss.detach())


def timed(work: Callable[[], object]) -> float:
    """Seconds of `work`."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
