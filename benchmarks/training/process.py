"""A trainer's first steps in a fresh process: how soon they come, and how much memory they take.

    python -m benchmarks.training.process OBJECTS_URL DATASET_ID MODEL HOME STEPS
    python -m benchmarks.training.process bare STEPS

Prints JSON. The trainer's own story is told up to the step that was asked for; nothing is exported or
tracked, which other parts measure.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, cast

from benchmarks.serving.process import ROOT

if TYPE_CHECKING:
    from medloop_trainer.progress import Bars
    from medloop_trainer.track import Run

    from benchmarks.training.bench import Bench

_POLLED_S = 0.02
_RUN = "f" * 32


@dataclass(frozen=True, slots=True)
class FirstSteps:
    """Seconds of importing, then from the beginning of opening to the opened data set, and to the end of its first
    step; bytes at the peak, without pages of files (the cache of decoded images above all), which the kernel takes back
    when it needs them."""

    imports: float
    opened: float
    first_step: float
    opened_bytes: int
    peak_bytes: int


def first_steps(bench: "Bench", dataset_id: str, model: str, steps: int) -> FirstSteps:
    """Of a training in a process of its own; raises RuntimeError with its last words when it fails."""
    found = _child(bench.objects_url, dataset_id, model, str(bench.home.home), str(steps))
    return FirstSteps(**found)  # type: ignore[arg-type]  # what `main` printed


def bare_peak(steps: int) -> int:
    """Bytes at the peak of the same network and optimizer on one batch in memory, in a process of its own."""
    return int(_child("bare", str(steps))["peak_bytes"])


def _child(*arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.training.process", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[2:])} failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


class Peak:
    """The most anonymous memory of this process inside the context, looked at by a thread every 20 ms."""

    def __init__(self) -> None:
        self.bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_POLLED_S):
            self.bytes = max(self.bytes, anonymous_bytes())


def anonymous_bytes() -> int:
    """What this process holds that no file stands behind (proc(5), smaps_rollup)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


class _Silent:
    """Stands where the trainer's run is: nothing is tracked."""

    id = _RUN

    def log_params(self, params: object) -> None:
        """Forget them."""

    def log_epoch(self, epoch: object) -> None:
        """Forget it."""


class _Watch:
    """Stands where the trainer's bars are: notes when the first step was done, and says stop after the last."""

    def __init__(self, steps: int) -> None:
        from medloop_trainer.stop import Stop

        self.first: float | None = None
        self.stop = Stop()
        self._left = steps

    def __call__(self, step: str, done: int, total: int) -> None:
        if step == "training":
            self.first = self.first or time.perf_counter()
            self._left -= 1
            self.stop.requested = self._left <= 0

    def note(self, step: str, text: str) -> None:
        """Nobody reads it."""

    @contextmanager
    def waiting(self, step: str) -> Iterator[None]:
        yield


def _train(objects_url: str, dataset_id: str, model: str, home: str, steps: int) -> FirstSteps:
    begun = time.perf_counter()
    from medloop.errors import Preempted
    from medloop.settings import HomeSettings
    from medloop.storage.objects import open_objects
    from medloop_trainer.checkpoint import remove_checkpoints
    from medloop_trainer.dataset import gather, look_at
    from medloop_trainer.learn import Surroundings, begin
    from medloop_trainer.recipe import Options
    from medloop_trainer.settings import LoopSettings
    from medloop_trainer.train import import_torch

    import_torch()
    imported = time.perf_counter()
    objects, options, watch = open_objects(objects_url), Options(), _Watch(steps)
    cache_dir = HomeSettings(home=Path(home)).cache_dir
    around = Surroundings(objects, cast("Run", _Silent()), cast("Bars", watch), watch.stop)
    with Peak() as peak:
        material = gather(objects, dataset_id, model, lambda of: look_at(of, objects).spec(options), cache_dir)
        opened, opened_bytes = time.perf_counter(), anonymous_bytes()
        try:
            begin(material, options, LoopSettings(), around)
        except Preempted:
            remove_checkpoints(objects, _RUN)
    if watch.first is None:
        raise RuntimeError("training ended before its first step")
    return FirstSteps(imported - begun, opened - imported, watch.first - imported, opened_bytes, peak.bytes)


def _bare(steps: int) -> int:
    import numpy as np
    from medloop_trainer.device import choose_device

    from benchmarks.training import jpegs
    from benchmarks.training.bare import Bare
    from benchmarks.training.material import BATCH, architecture, recipe

    pixels = np.zeros((BATCH, jpegs.SIZE, jpegs.SIZE, 1), np.uint8)
    with Peak() as peak:
        Bare(architecture(), recipe(jpegs.IMAGES, 1, steps), choose_device(), pixels, whole=False)(steps)
    return peak.bytes


def main() -> None:
    first, *others = sys.argv[1:]
    if first == "bare":
        print(json.dumps({"peak_bytes": _bare(int(others[0]))}))
    else:
        dataset_id, model, home, steps = others
        print(json.dumps(asdict(_train(first, dataset_id, model, home, int(steps)))))


if __name__ == "__main__":
    main()
