"""What the processes of one training (ranks) do together, by torch.distributed; a process alone does nothing for it.

Everything here is called by all ranks, in the same order. The first rank leads: where a decision could hang on a last
bit, it is the leader's that counts.

Gradients are summed here and not by `DistributedDataParallel`: one sum carries them, the batch norms' statistics and
the loss, each weighted by how many images the rank had, and that another rank was lost is told in one place. On two
processors both take the same time; what this gives up, exchanging gradients while others are still computed, would pay
between GPUs with a slow network.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import torch
import torch.distributed as dist
from medloop.errors import InvalidRequest, Unavailable
from numpy.typing import NDArray
from torch import Tensor

from medloop_trainer.checkpoint import Snapshot
from medloop_trainer.sampler import share
from medloop_trainer.state import State


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process, number `rank` of `world`. Every verb raises Unavailable when another rank is gone."""

    rank: int = 0
    world: int = 1

    @classmethod
    def present(cls) -> Self:
        """Those of torch's process group, or a process alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def check(self, images: int) -> None:
        """Raises InvalidRequest unless a batch of `images` gives every rank at least two, which batch norms need."""
        if self.world > 1 and images < 2 * self.world:
            raise InvalidRequest(
                f"{self.world} processes are too many for batches of {images} images, of which each needs two; start "
                "fewer, or choose a larger --batch-size."
            )

    def share(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """This rank's part of `rows` [N]; all ranks' together are each row once."""
        return share(rows, self.rank, self.world)

    def average(self, tensors: Sequence[Tensor], weight: float) -> None:
        """Replace `tensors` (float32, on one device) by their sum over ranks, after each was multiplied by its rank's
        `weight`: the same bits everywhere."""
        if self.world == 1:
            return
        together = torch.cat([tensor.reshape(-1) for tensor in tensors]) * weight
        with _others_needed():
            dist.all_reduce(together)
        parts = together.split([tensor.numel() for tensor in tensors])  # type: ignore[no-untyped-call]
        for tensor, summed in zip(tensors, parts, strict=True):
            tensor.copy_(summed.view(tensor.shape))

    def any(self, asked: bool) -> bool:
        """Whether any rank says so."""
        if self.world == 1:
            return asked
        said = torch.tensor(int(asked))
        with _others_needed():
            dist.all_reduce(said, dist.ReduceOp.MAX)
        return bool(said)

    def gathered(self, shares: NDArray[np.float32], count: int) -> NDArray[np.float32]:
        """float32 [`count`, K]: every rank's `shares` [n, K], in the order of the rows that `share` took."""
        if self.world == 1:
            return shares
        whole = torch.zeros(count, shares.shape[1])
        whole[self.rank :: self.world] = torch.from_numpy(shares)
        with _others_needed():
            dist.all_reduce(whole)
        return whole.numpy()

    def leaders(self, number: float) -> float:
        """The leader's number."""
        if self.world == 1:
            return number
        said = torch.tensor(number, dtype=torch.float64)
        with _others_needed():
            dist.broadcast(said, 0)
        return float(said)

    def leaders_text(self, text: str) -> str:
        """What the leader says."""
        return self._leaders_bytes(text.encode()).decode()

    def leaders_snapshot(self, snapshot: Snapshot) -> Snapshot:
        """The leader's snapshot."""
        from safetensors.torch import load, save

        if self.world == 1:
            return snapshot
        state = self.leaders_text(snapshot.state.model_dump_json())
        tensors = self._leaders_bytes(save(snapshot.tensors) if self.leads else b"")
        return snapshot if self.leads else Snapshot(State.model_validate_json(state), load(tensors))

    def wait(self) -> None:
        """Until all are here."""
        self.any(False)

    def _leaders_bytes(self, data: bytes) -> bytes:
        if self.world == 1:
            return data
        length = int(self.leaders(len(data)))
        said = torch.frombuffer(bytearray(data), dtype=torch.uint8) if self.leads else torch.empty(length).byte()
        with _others_needed():
            dist.broadcast(said, 0)
        return said.numpy().tobytes()


ALONE: Final = Ranks()


@contextmanager
def _others_needed() -> Iterator[None]:
    try:
        yield
    except RuntimeError as exc:  # gloo has no class of its own for a connection that broke
        raise Unavailable(
            "Another process of this training is gone; what it said last says why. The run goes on with --resume."
        ) from exc
