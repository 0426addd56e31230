"""How many processors this process may use, and which kind they are.

A container's limit is a quota of CPU time that `os.cpu_count` knows nothing of: threads beyond it only make the kernel
stop all of them for the rest of each period (Linux, `Documentation/scheduler/sched-bwc.rst`).
"""

import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path

_CONTROLLERS = ("cpu", "cpu,cpuacct")  # names that version 1 of cgroups is mounted under


def available_cpus(root: Path = Path("/")) -> int:
    """Processors that this process may run on, at most its cgroups' quota, rounded up; at least 1.

    `root` is where `proc` and `sys` lie.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(math.ceil(quota) for quota in _quotas(root))]))


def cpu_name(root: Path = Path("/")) -> str:
    """The processor's name as it gives it, such as "AMD EPYC 9R14"; the architecture where it gives none."""
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []  # not Linux
    names = [value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() == "model name"]
    return names[0] if names else platform.processor() or platform.machine()


def _quotas(root: Path) -> Iterator[float]:
    """What each cgroup that this process is in, directly or through a parent, allows it: processors."""
    for folder in _cgroups(root):
        # Version 2: "max 100000" or "150000 100000", microseconds in a period.
        if found := _words(folder / "cpu.max"):
            yield from [int(found[0]) / int(found[1])] if found[0] != "max" else []
        # Version 1: two files; -1 is no limit.
        quota, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
        if quota and period and int(quota[0]) > 0:
            yield int(quota[0]) / int(period[0])


def _cgroups(root: Path) -> Iterator[Path]:
    """The folders of this process's cgroups and of those above them. Inside a container the path may be the host's,
    of which only the top is mounted here; folders that do not exist are left to the reader."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return  # no Linux, or nothing of /proc to be seen
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in _CONTROLLERS if controllers else (".",):
            top, inside = root / "sys/fs/cgroup" / mount, Path(path.lstrip("/"))
            yield from (top / part for part in (inside, *inside.parents) if ".." not in part.parts)


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
