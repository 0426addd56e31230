"""What a training was made with: the code, the packages and the machine."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

from medloop.cpus import available_cpus, cpu_name

TAG_LAUNCH = "medloop.launch"
_PACKAGES = ("medloop", "torch", "torchvision", "onnx", "onnxruntime", "numpy", "pillow", "mlflow-skinny", "mlflow")
_HERE = Path(__file__).resolve().parent
_LOCKS = ("requirements/trainer.txt", "requirements/torch.txt")
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Checkout:
    """`commit` is 40 hex digits; `dirty` says that tracked files differ from it."""

    commit: str
    dirty: bool


def checkout(folder: Path = _HERE) -> Checkout | None:
    """The git checkout that `folder` is a tracked part of; None where there is none, as in an image or a wheel."""
    # Installed below somebody else's checkout (a virtual environment in it), their commit would say nothing of us.
    if _git(folder, "ls-files", "--error-unmatch", ".") is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
    return None if commit is None or changes is None else Checkout(commit, dirty=bool(changes))


def git_commit() -> str | None:
    """The commit of the checkout this code runs from; None outside of one."""
    found = checkout()
    return found.commit if found else None


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment_digest(root: Path = _HERE.parents[2], locks: Sequence[str] = _LOCKS) -> str:
    """`lock:` and the SHA-256 of the lock files below the checkout `root`; where those are not at hand, `installed:`
    and that of the installed distributions' sorted names and versions."""
    digest = hashlib.sha256()
    if all((root / lock).is_file() for lock in locks):
        for lock in locks:
            content = (root / lock).read_bytes()
            digest.update(f"{lock} {len(content)}\n".encode() + content)
        return f"lock:{digest.hexdigest()}"
    found = sorted({f"{entry.name.lower()}=={entry.version}" for entry in distributions()})
    digest.update("\n".join(found).encode())
    return f"installed:{digest.hexdigest()}"


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may use: the machine's, or its container's limit where that is less. `root` is where
    `sys` lies."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroups of version 2, of version 1
        limit = root / "sys/fs/cgroup" / name
        if limit.is_file() and (text := limit.read_text().strip()) != "max":
            found.append(int(text))
    return min(found)


def gpu_names() -> list[str]:
    import torch  # seconds: only a training pays

    return [torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count())]


def environment_tags() -> dict[str, str]:
    """Tags for a run. Torch's number of threads is not among them: it is settled with the device, as a parameter."""
    tags = {
        "medloop.environment": environment_digest(),
        "medloop.python": sys.version.split()[0],
        "medloop.cpu": cpu_name(),
        "medloop.cpus": str(available_cpus()),
        "medloop.memory_gib": f"{available_memory() / _GIB:.1f}",
        "medloop.gpus": ", ".join(gpu_names()) or "none",
    }
    if (own := launch()) is not None:
        tags[TAG_LAUNCH] = own
    if (code := checkout()) is not None:
        # MLflow shows these under its own names.
        tags |= {"mlflow.source.git.commit": code.commit, "mlflow.source.git.dirty": str(code.dirty).lower()}
    return tags


def by_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def restarts() -> int:
    """How often torchrun started its processes anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launch() -> str | None:
    """What all processes of this training have in common, also those that were started anew: the id of their torchrun,
    else `MEDLOOP_LAUNCH`. None where neither was given."""
    by_orchestrator = os.environ.get("MEDLOOP_LAUNCH") or None
    by_torchrun = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return by_orchestrator if by_torchrun == "none" else by_torchrun


def package_versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # mlflow beside mlflow-skinny is not everywhere
            continue
    return found
