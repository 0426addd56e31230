"""What this process trains on: a GPU where there is one, else as many threads as it may use."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from medloop.errors import InvalidRequest


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
    """Pick the device and set torch's number of threads, unless `OMP_NUM_THREADS` has set it.

    Of several processes that torchrun started on this machine, each takes a GPU, or its part of the processors. Raises
    InvalidRequest when there are more of them than GPUs.
    """
    place, processes = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    given = os.environ.get("OMP_NUM_THREADS")
    if given is None or (given == "1" and processes > 1):  # where nobody sets it, torchrun sets 1
        torch.set_num_threads(max(1, available_cpus() // processes))
    threads = torch.get_num_threads()
    if torch.cuda.is_available():
        if place >= torch.cuda.device_count():
            raise InvalidRequest(
                f"There is no GPU for each process; choose --nproc-per-node {torch.cuda.device_count()}."
            )
        torch.cuda.set_device(place)  # from here on it is what "cuda" means
        # Two runs with one seed are to be equal to the bit; atomic additions in some kernels would not have it.
        torch.backends.cudnn.deterministic = True
        return Device("cuda", torch.bfloat16, threads)
    # Only where the processor multiplies bfloat16 itself is that faster than float32; elsewhere it would crawl.
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
