"""Randomness by position instead of by state.

What step s of a run draws depends on the seed and on s alone: every pass over the data has a generator of its own for
the order, and the global generators, from which augmentation and dropout draw, are seeded anew before each step. So a
checkpoint holds no generator's state, whatever drew from one in between (a validation, a measurement, a library), and
a training that goes on somewhere else, after any step, draws what it would have drawn. Ranks of one step draw
different numbers.
"""

import hashlib

import torch


def mixed(seed: int, stream: str, *position: int) -> int:
    """A number in [0, 2^64) for one place in one stream of a run; neighbouring places have nothing in common."""
    text = ":".join(str(part) for part in (stream, seed, *position))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def generator(seed: int, stream: str, *position: int) -> torch.Generator:
    """torch's generator on the CPU, for one place of a stream."""
    return torch.Generator().manual_seed(mixed(seed, stream, *position))


def seed_weights(seed: int) -> None:
    """Seed what a network's first weights are drawn from."""
    torch.manual_seed(mixed(seed, "weights"))


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed all of torch's global generators for one step (counted from 0) on one rank."""
    torch.manual_seed(mixed(seed, "step", step, rank))
