"""One step down the gradient, and everything that it changes: the network, its average, the optimizer."""

import copy
import itertools
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as functional
from medloop.errors import TrainingFailed
from medloop.nets import ServedNetwork
from medloop.nets.architectures import Activations
from numpy.typing import NDArray
from torch import Tensor, nn

from medloop_trainer.augment import Augmentation
from medloop_trainer.average import Average
from medloop_trainer.device import Device
from medloop_trainer.images import Pixels, fetch
from medloop_trainer.ranks import ALONE, Ranks
from medloop_trainer.recipe import Recipe

_LARGEST_GRADIENT = 2.0  # norm
_SCORING_BATCH = 256
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps for each parameter


class Learner:
    """`network`, moved to the device and trained there in place.

    `shares` [K] are those that classes are shown with, which logit adjustment takes out of what is served (Menon et
    al. 2021). `compiled` runs forward passes of training through `torch.compile`.

    With several `ranks` each learns from its part of a batch, and all have equal weights after each step. Batch norms
    normalise by all parts together on GPUs; on processors, where that would need forty more exchanges a step, by the
    rank's own part, and their running statistics are averaged.
    """

    def __init__(
        self,
        network: ServedNetwork,
        recipe: Recipe,
        device: Device,
        shares: NDArray[np.float64],
        *,
        compiled: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        network.to(device.name, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network = network
        self.average = Average(network, recipe) if recipe.ema_decay > 0 else None
        self._recipe, self._device, self._ranks = recipe, device, ranks
        self._augment = Augmentation(recipe, network.architecture.classes)
        self._optimizer = _optimizer(network, recipe)
        self._parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        synchronised = ranks.world > 1 and device.name == "cuda"
        self._trained = _synchronised(network) if synchronised else network
        self._statistics = [] if synchronised else _statistics(network)
        forward: Callable[[Tensor], Activations] = self._trained.activations
        self._forward = torch.compile(forward) if compiled else forward
        # A class that is never shown has no say in the loss, and log 0 none in the sum.
        priors = np.pad(shares, (0, network.architecture.classes - len(shares)))
        adjustment = recipe.logit_adjustment * np.log(np.maximum(priors, 1e-9))
        self._adjustment = torch.from_numpy(adjustment).float().to(device.name)

    @property
    def judged(self) -> ServedNetwork:
        """The network that validation looks at."""
        return self.network if self.average is None else self.average.network

    def step(
        self,
        step: int,
        pixels: NDArray[np.uint8],
        labels: NDArray[np.int64],
        rate: float,
        *,
        mix: bool,
        weight: float = 1.0,
    ) -> Tensor:
        """Learn from one batch, or the `weight` of it in (0, 1] that is this rank's: `pixels` uint8 [B, S, S, C] and
        `labels` int64 [B].

        Returns the loss of the whole batch before it, float32 [] on the device: no number also where the gradient is
        none. Random numbers come from torch's global generators. Raises TrainingFailed when the GPU's memory is not
        enough, and Unavailable when another rank is gone.
        """
        self._trained.train()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        try:
            images = channels_first(pixels, self._device)
            inputs, targets = self._augment(images, torch.from_numpy(labels).to(self._device.name), mix=mix)
            loss = self._loss(inputs.contiguous(memory_format=torch.channels_last), targets)
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            loss = loss.detach()
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            self._ranks.average([loss, *gradients, *self._statistics], weight)
            norm = nn.utils.clip_grad_norm_(self.network.parameters(), _LARGEST_GRADIENT)
            self._optimizer.step()
        except torch.OutOfMemoryError as exc:
            half = self._recipe.batch_size // 2
            raise TrainingFailed(f"The GPU's memory is not enough; choose --batch-size {half}.") from exc
        if self.average is not None:
            self.average.update(step)
        # An infinite gradient spoils the weights, which the next loss would tell too late for a checkpoint between.
        return torch.where(norm.isfinite(), loss, torch.nan)

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        device = self._device
        with torch.autocast(device.name, device.autocast, enabled=device.mixed):
            logits = self._forward(inputs).logits
        return functional.cross_entropy(
            logits.float() + self._adjustment, targets, label_smoothing=self._recipe.label_smoothing
        )

    def tensors(self) -> dict[str, Tensor]:
        """Copies on the CPU, in plain memory order, of all that a step changes."""
        found = _copies("model", self.network)
        if self.average is not None:
            found |= _copies("average", self.average.network)
        for number, parameter in enumerate(self._parameters):
            for name, moment in self._optimizer.state.get(parameter, {}).items():
                found[f"optimizer.{number}.{name}"] = plain_copy(moment)
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave; raises RuntimeError when they are another network's."""
        self.network.load_state_dict(under("model", tensors))
        if self.average is not None:
            self.average.network.load_state_dict(under("average", tensors))
        self._optimizer.state.clear()
        for number, parameter in enumerate(self._parameters):
            moments = under(f"optimizer.{number}", tensors)
            if moments:  # none before the first step
                self._optimizer.state[parameter] = {name: _like(parameter, moments[name]) for name in _MOMENTS}


def _optimizer(network: ServedNetwork, recipe: Recipe) -> torch.optim.AdamW:
    # Decay pulls weights of convolutions and products to zero; for biases and norms it has no meaning.
    decayed = [p for p in network.parameters() if p.ndim > 1]
    free = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)


def _synchronised(network: ServedNetwork) -> ServedNetwork:
    """`network`'s own tensors in other modules, whose batch norms normalise by all ranks' images: training it trains
    `network`, which keeps the modules that are exported."""
    tensors = {id(tensor): tensor for tensor in itertools.chain(network.parameters(), network.buffers())}
    twin: ServedNetwork = nn.SyncBatchNorm.convert_sync_batchnorm(  # type: ignore[no-untyped-call]
        copy.deepcopy(network, tensors)
    )
    return twin


def _statistics(network: ServedNetwork) -> list[Tensor]:
    """The running means and variances of batch norms."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    return [value for norm in norms for value in (norm.running_mean, norm.running_var) if value is not None]


def _like(parameter: Tensor, moment: Tensor) -> Tensor:
    """`moment` on the parameter's device and, being of its shape, in its memory order, which the fused kernel needs."""
    if moment.shape != parameter.shape:
        return moment.to(parameter.device, copy=True)
    return torch.empty_like(parameter, memory_format=torch.preserve_format, requires_grad=False).copy_(moment)


def plain_copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU in plain memory order, which is all that safetensors writes."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def _copies(prefix: str, network: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": plain_copy(value) for name, value in network.state_dict().items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose name starts with `prefix` and a dot, named by the rest."""
    start = prefix + "."
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


def channels_first(pixels: NDArray[np.uint8], device: Device) -> Tensor:
    """uint8 [N, S, S, C] → [N, C, S, S] on the device, which is channels last in memory already."""
    return torch.from_numpy(np.array(pixels)).to(device.name).permute(0, 3, 1, 2)


@torch.inference_mode()
def logits_of(
    network: ServedNetwork,
    pixels: Pixels,
    device: Device,
    *,
    rows: NDArray[np.int64] | None = None,
    between: Callable[[], object] = lambda: None,
) -> NDArray[np.float32]:
    """Logits f32 [N, K] of `rows` of `pixels` (all by itself), in evaluation mode and full precision.

    `between` is called after every batch and while pixels are waited for, and may raise to end it.
    """
    network.eval()
    found = [np.empty((0, network.architecture.classes), np.float32)]
    rows = np.arange(len(pixels)) if rows is None else rows
    batches = [rows[start : start + _SCORING_BATCH] for start in range(0, len(rows), _SCORING_BATCH)]
    for _, batch in fetch(pixels, batches, between, aside=True):
        images = channels_first(batch, device)
        found.append(network.activations(images.float()).logits.float().cpu().numpy())
        between()
    return np.concatenate(found)
