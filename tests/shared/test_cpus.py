"""The quota of a cgroup bounds the processors, in both versions, from this group or one above it."""

import os
from pathlib import Path

import pytest
from medloop.cpus import available_cpus, cpu_name


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


def machine(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    for name, content in {"proc/self/cgroup": cgroup, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "10000 100000\n"}, 1),
        ("0::/pods/a\n", {"sys/fs/cgroup/pods/cpu.max": "300000 100000", "sys/fs/cgroup/pods/a/cpu.max": "max 1"}, 3),
        ("0::/../other\n", {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        (
            "5:memory:/m\n4:cpu,cpuacct:/docker/on-the-host\n",
            {
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/memory/m/cpu.cfs_quota_us": "1\n",
            },
            3,
        ),
        ("1:cpu:/\n", {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "9"}, 8),
    ],
)
def test_the_smallest_quota_counts_rounded_up(
    tmp_path: Path, cgroup: str, files: dict[str, str], expected: int
) -> None:
    assert available_cpus(machine(tmp_path, cgroup, files)) == expected


def test_without_cgroups_the_affinity_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_cpus(tmp_path) == 8
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert available_cpus(machine(tmp_path, "0::/\n", {"sys/fs/cgroup/cpu.max": "400000 100000"})) == 1


def test_the_processor_is_named_as_it_names_itself(tmp_path: Path) -> None:
    assert cpu_name(machine(tmp_path, "", {"proc/cpuinfo": "model\t: 17\nmodel name\t: AMD EPYC\n"})) == "AMD EPYC"
    assert cpu_name(tmp_path / "elsewhere")
