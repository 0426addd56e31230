"""What this machine trains on: a GPU where there is one, else as many threads as it may use."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class Device:
    """`autocast` is the type of convolutions and products while training; weights, validation and the bundle are
    float32 always."""

    name: str
    autocast: torch.dtype
    threads: int

    @property
    def mixed(self) -> bool:
        return self.autocast != torch.float32


def choose_device() -> Device:
    """Pick the device and set torch's number of threads, unless `OMP_NUM_THREADS` has set it."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(available_cpus())
    threads = torch.get_num_threads()
    if torch.cuda.is_available():
        # Two runs with one seed are to be equal to the bit; atomic additions in some kernels would not have it.
        torch.backends.cudnn.deterministic = True
        return Device("cuda", torch.bfloat16, threads)
    # Where the processor multiplies bfloat16 itself, training takes 60 % of float32's time; elsewhere it would crawl.
    capabilities = torch.cpu.get_capabilities()
    fast = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return Device("cpu", torch.bfloat16 if fast else torch.float32, threads)


def available_cpus(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Processors this process may use: its affinity, and a container's quota (cgroup v2), rounded up."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if quota.is_file():
        limit, period = quota.read_text().split()
        if limit != "max":
            count = min(count, -(-int(limit) // int(period)))
    return max(1, count)
