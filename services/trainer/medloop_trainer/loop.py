"""The training loop: AdamW on one cycle of the learning rate, with the best epoch on the validation split kept."""

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as functional
from medloop.data.parallel import ProgressFn
from medloop.errors import TrainingFailed
from medloop.nets import ServedNetwork
from numpy.typing import NDArray
from torch import Tensor

from medloop_trainer.augment import Augmentation
from medloop_trainer.calibrate import find_temperature
from medloop_trainer.device import Device
from medloop_trainer.recipe import Recipe
from medloop_trainer.scores import Scores, score

log = logging.getLogger(__name__)

_WARM_UP = 0.25  # share of all steps in which the learning rate rises
_FIRST, _LAST = 1 / 25, 1 / 1000  # learning rate at both ends, of its peak
_LARGEST_GRADIENT = 2.0  # norm
_SCORING_BATCH = 256


@dataclass(frozen=True, slots=True)
class Images:
    """`pixels` uint8 [N, S, S, C] of a whole data set version, `labels` int64 [N], and the rows of two splits."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    train: NDArray[np.int64]
    val: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Epoch:
    """`number` counts from 1; `train_loss` is the mean cross-entropy against smoothed and mixed targets.

    `judged_by` is the validation loss at its own best temperature: mixed and smoothed targets make a network timid,
    which calibration undoes later, so how sure it is must not decide which epoch is best.
    """

    number: int
    train_loss: float
    val: Scores
    judged_by: float
    learning_rate: float
    images_per_second: float


@dataclass(frozen=True, slots=True)
class Fit:
    """`images_per_second` counts forward and backward passes with loading and augmentation, not validation."""

    epochs: tuple[Epoch, ...]
    best: Epoch
    images_per_second: float


def fit(
    network: ServedNetwork,
    images: Images,
    recipe: Recipe,
    device: Device,
    *,
    report: Callable[[Epoch], None] | None = None,
    progress: ProgressFn | None = None,
) -> Fit:
    """Train `network` in place; it ends with the weights of the epoch that the validation split liked best.

    All random numbers come from torch's global generator: seed it before building the network. Raises TrainingFailed
    when the loss is no number any more or the GPU's memory is not enough.
    """
    network.to(device.name, memory_format=torch.channels_last)  # type: ignore[call-overload]
    augment = Augmentation(recipe, network.architecture.classes)
    optimizer = _optimizer(network, recipe)
    steps = recipe.epochs * count_batches(len(images.train), recipe)
    step, shown, busy = 0, 0, 0.0
    epochs, best, best_weights = list[Epoch](), None, {}
    for number in range(1, recipe.epochs + 1):
        network.train()
        started, losses = time.perf_counter(), []
        for rows in batches(images, recipe):
            rate = recipe.learning_rate * one_cycle(step / steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            pixels, labels = _load(images, rows, device)
            inputs, targets = augment(pixels, labels, mix=number <= recipe.cutmix_epochs())
            losses.append(_step(network, optimizer, inputs, targets, recipe, device))
            step, shown = step + 1, shown + len(rows)
            if progress:
                progress("training", shown, recipe.epochs * len(images.train))
        seconds = time.perf_counter() - started
        busy += seconds
        _check_finite(losses, number, recipe)
        logits, truth = logits_of(network, images.pixels[images.val], device), images.labels[images.val]
        val, judged_by = score(logits, truth), score(logits / find_temperature(logits, truth), truth).loss
        epoch = Epoch(number, float(np.mean(losses)), val, judged_by, rate, len(images.train) / seconds)
        epochs.append(epoch)
        if math.isfinite(judged_by) and (best is None or judged_by < best.judged_by):
            best, best_weights = epoch, copy.deepcopy(network.state_dict())
        if report:
            report(epoch)
    if best is None:
        raise TrainingFailed("No epoch ended with a loss that is a number; choose a smaller --learning-rate.")
    network.load_state_dict(best_weights)
    return Fit(tuple(epochs), best, len(images.train) * recipe.epochs / busy)


def one_cycle(share: float) -> float:
    """The learning rate as a share of its peak, `share` of all steps in: a linear rise, then half a cosine (Smith &
    Topin 2019)."""
    if share < _WARM_UP:
        return _FIRST + (1 - _FIRST) * share / _WARM_UP
    down = (share - _WARM_UP) / (1 - _WARM_UP)
    return _LAST + (1 - _LAST) * (1 + math.cos(math.pi * down)) / 2


def count_batches(images: int, recipe: Recipe) -> int:
    return max(1, images // recipe.batch_size)


def batches(images: Images, recipe: Recipe) -> Iterator[NDArray[np.int64]]:
    """One epoch's rows in random order, in batches of equal size, give or take one.

    Rare classes are shown more often: each image of a class of n with a frequency of n^-1/2 (Mahajan et al. 2018),
    half way between the data's own prior and equal shares. With equal classes every image is shown exactly once.
    """
    order = _order(images.labels[images.train])
    for part in np.array_split(order, count_batches(len(order), recipe)):
        yield images.train[part]


def _order(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """As many places in `labels` as there are, shuffled: classes by the square root of their size."""
    roots = np.sqrt(np.bincount(labels))
    wanted = len(labels) * roots / roots.sum()
    bounds = np.rint(np.concatenate([[0.0], np.cumsum(wanted)])).astype(int)  # shares that add up exactly
    chosen = []
    for k, count in enumerate(np.diff(bounds)):
        places = np.flatnonzero(labels == k)
        rounds = -(-count // max(1, len(places)))  # whole passes over the class, the last one cut short
        passes = [places[torch.randperm(len(places)).numpy()] for _ in range(rounds)]
        chosen.append(np.concatenate([*passes, places[:0]])[:count])
    order = np.concatenate(chosen)
    return np.asarray(order[torch.randperm(len(order)).numpy()])


@torch.inference_mode()
def logits_of(network: ServedNetwork, pixels: NDArray[np.uint8], device: Device) -> NDArray[np.float32]:
    """Logits f32 [N, K] of `pixels` uint8 [N, S, S, C], N ≥ 1, in evaluation mode and full precision."""
    network.eval()
    found = []
    for start in range(0, len(pixels), _SCORING_BATCH):
        batch = _channels_first(pixels[start : start + _SCORING_BATCH], device)
        found.append(network.activations(batch.float()).logits.float().cpu().numpy())
    return np.concatenate(found)


def _optimizer(network: ServedNetwork, recipe: Recipe) -> torch.optim.AdamW:
    # Decay pulls weights of convolutions and products to zero; for biases and norms it has no meaning.
    decayed = [p for p in network.parameters() if p.ndim > 1]
    free = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate)


def _load(images: Images, rows: NDArray[np.int64], device: Device) -> tuple[Tensor, Tensor]:
    labels = torch.from_numpy(images.labels[rows]).to(device.name)
    return _channels_first(images.pixels[rows], device), labels


def _channels_first(pixels: NDArray[np.uint8], device: Device) -> Tensor:
    """uint8 [N, S, S, C] → [N, C, S, S], which is channels last in memory already."""
    return torch.from_numpy(np.array(pixels)).to(device.name).permute(0, 3, 1, 2)


def _step(
    network: ServedNetwork,
    optimizer: torch.optim.AdamW,
    inputs: Tensor,
    targets: Tensor,
    recipe: Recipe,
    device: Device,
) -> float:
    """One step down the gradient; returns the loss before it."""
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    try:
        with torch.autocast(device.name, device.autocast, enabled=device.mixed):
            logits = network.activations(inputs).logits
        loss = functional.cross_entropy(logits.float(), targets, label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), _LARGEST_GRADIENT)
        optimizer.step()
    except torch.OutOfMemoryError as exc:
        raise TrainingFailed(f"The GPU's memory is not enough; choose --batch-size {recipe.batch_size // 2}.") from exc
    return float(loss.detach())


def _check_finite(losses: list[float], epoch: int, recipe: Recipe) -> None:
    if not np.isfinite(losses).all():
        raise TrainingFailed(
            f"The loss was no number any more in epoch {epoch}; "
            f"choose a smaller --learning-rate than {recipe.learning_rate:g}."
        )
