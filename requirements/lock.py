"""Write the locks, or with `--check` say which of them are stale.

One resolve (`dev.txt`) covers everything; each service's lock is cut from it, so that versions agree. torch,
torchvision and the CUDA packages they pull stand in `torch.txt` alone, so that another index can be chosen for them.
Images share layers, each with a lock of its own: `medloop.txt` is the library with what images have of its extras, and
`engine.txt` what runs networks, without which the dashboard is locked and installed, since it runs none.
The peers of the benchmarks are resolved apart, since they run in environments of their own, beside the same torch, and
so is checkov, whose dependencies would hold ours back.
The locks carry hashes and no addresses.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
SERVICES = ("trainer", "evaluator", "explainer", "inference", "dashboard")
PEERS = ("peers", "peers-mlserver")
LOCAL = ("medloop", *(f"medloop-{service}" for service in SERVICES))
ENGINE = ("onnxruntime", "flatbuffers")
TORCH = re.compile(r"torch|torchvision|triton|nvidia-.*|cuda-.*")


def compile_lock(output: Path, sources: list[Path], *options: str) -> None:
    command = [
        *(sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11"),
        *("--generate-hashes", "--no-annotate", "--no-header"),
        *("--constraint", str(HERE / "constraints.in"), *options, "--output-file", str(output)),
        *map(str, sources),
    ]
    subprocess.run(command, check=True, cwd=ROOT)  # noqa: S603 - our own command line


def names(lock: Path) -> list[str]:
    """The packages that a lock names."""
    return re.findall(r"^([a-z0-9][a-z0-9._-]*)==", lock.read_text(), re.MULTILINE)


def without(packages: list[str]) -> list[str]:
    return [option for name in packages for option in ("--no-emit-package", name)]


def write_locks(folder: Path) -> list[Path]:
    """Compile every lock into `folder`; what lies there already is preferred, so that nothing moves unasked."""
    projects = {service: ROOT / "services" / service / "pyproject.toml" for service in SERVICES}
    shared = ROOT / "shared" / "pyproject.toml"
    everything = [shared, *projects.values(), HERE / "dev.in", HERE / "build.in", HERE / "mlflow.in"]
    local = without(list(LOCAL))
    with tempfile.TemporaryDirectory() as scratch:
        complete = Path(scratch) / "complete.txt"
        previous = [lock for lock in (folder / "dev.txt", folder / "torch.txt") if lock.exists()]
        complete.write_text("\n".join(lock.read_text() for lock in previous))
        compile_lock(complete, everything, "--all-extras", *local)
        torch = [name for name in names(complete) if TORCH.fullmatch(name)]
        others = [name for name in names(complete) if not TORCH.fullmatch(name)]
        pinned = ["--constraint", str(complete)]
        written = [folder / f"{name}.txt" for name in ("dev", "torch", *SERVICES, "mlflow", "build")]
        compile_lock(written[0], everything, "--all-extras", *pinned, *local, *without(torch))
        compile_lock(written[1], [shared], "--extra", "nets", *pinned, *local, *without(others))
        for service, output in zip(SERVICES, written[2:], strict=False):
            left_out = [*torch, *ENGINE] if service == "dashboard" else torch
            compile_lock(output, [projects[service]], *pinned, *local, *without(left_out))
        for tool, output in zip(("mlflow", "build"), written[-2:], strict=True):
            compile_lock(output, [HERE / f"{tool}.in"], *pinned)
        written += [folder / "medloop.txt", folder / "engine.txt"]
        compile_lock(written[-2], [shared], "--extra", "dicom", "--extra", "tracing", *pinned, *without(list(ENGINE)))
        compile_lock(written[-1], [shared], *pinned, *without(sorted({*torch, *others} - {*ENGINE})))
    uv = folder / "uv.txt"
    with tempfile.NamedTemporaryFile("w", suffix=".in") as source:
        source.write("uv\n")
        source.flush()
        compile_lock(uv, [Path(source.name)])
    checkov = folder / "checkov.txt"
    compile_lock(checkov, [HERE / "checkov.in"])
    return [*written, uv, checkov, *write_peers(folder)]


def write_peers(folder: Path) -> list[Path]:
    torch = folder / "torch.txt"
    written = [folder / f"{name}.txt" for name in PEERS]
    with tempfile.NamedTemporaryFile("w", suffix=".in") as source:
        source.write("torch\ntorchvision\n")  # what they must get along with
        source.flush()
        for output in written:
            sources = [HERE / f"{output.stem}.in", Path(source.name)]
            compile_lock(output, sources, "--constraint", str(torch), *without(names(torch)))
    return written


def main() -> int:
    if "--check" not in sys.argv:
        write_locks(HERE)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        for lock in HERE.glob("*.txt"):
            (Path(folder) / lock.name).write_text(lock.read_text())
        stale = [
            path.name
            for path in write_locks(Path(folder))
            if not (HERE / path.name).exists() or path.read_text() != (HERE / path.name).read_text()
        ]
    if stale:
        sys.stderr.write(f"Stale locks: {', '.join(stale)}. Run: make lock\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
