"""One of several processes that train together by the trainer's own loop, or one that trains alone.

    RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2 python -m benchmarks.training.together STORE JSON

STORE is a file that none has used yet, where the processes find each other; JSON is a `Trainings`. The first process
prints the epochs of each training as JSON.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
from medloop.vision.phantoms import CLASSES, phantom
from numpy.typing import NDArray

from benchmarks.serving.process import ROOT

JUDGED = 96
"""Validation images, which no training is shown."""
_LOST = timedelta(minutes=2)  # for a process whose partner died before it came
_SECONDS = 900.0  # for all of them to end


@dataclass(frozen=True, slots=True)
class Trainings:
    """One for each of `seeds`, on as many drawn `images` of `size` px, in `epochs` of at most so many `steps`."""

    size: int
    images: int
    epochs: int
    steps: int
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True, slots=True)
class Judged:
    """An epoch: `train_loss` as it is tracked, the validation split's, and images a second of its steps."""

    train_loss: float
    val_loss: float
    images_per_second: float


Curve = list[Judged]


def train(trainings: Trainings, processes: int) -> list[Curve]:
    """The curve of each seed, trained by so many processes that share this machine's processors. Raises RuntimeError
    when one of them fails; what it said went to standard error."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        command = [sys.executable, "-m", "benchmarks.training.together", str(Path(folder) / "store")]
        command.append(json.dumps(asdict(trainings)))
        started = []
        for rank in range(processes):
            environment = _environment(rank, processes)
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)  # before it is waited for; nothing to one that has ended
            started.append(process)
        said = [process.communicate(timeout=_SECONDS)[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"{processes} processes did not train together; what they said stands above.")
    return [[Judged(**epoch) for epoch in curve] for curve in json.loads(said[0].splitlines()[-1])]


def _environment(rank: int, processes: int) -> dict[str, str]:
    # Threads are the trainer's to choose, and processors are what is compared.
    own = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    return own | {name: str(value) for name, value in place.items()} | {"CUDA_VISIBLE_DEVICES": ""}


def curves(trainings: Trainings) -> list[Curve]:
    """What this process comes to, with the others if there are any."""
    pixels, labels = _drawn(trainings)  # first: what cannot be drawn is told before torch is loaded
    from medloop_trainer.device import choose_device
    from medloop_trainer.images import Images
    from medloop_trainer.loop import fit
    from medloop_trainer.ranks import Ranks

    from benchmarks.training.bare import network
    from benchmarks.training.material import architecture, recipe

    rows = np.arange(len(labels))
    images = Images(pixels, labels, rows[:-JUDGED], rows[-JUDGED:])
    device, ranks, found = choose_device(), Ranks.present(), []
    settled = recipe(trainings.images, trainings.epochs, trainings.steps, trainings.size)
    for seed in trainings.seeds:
        of = settled.model_copy(update={"seed": seed})
        done = fit(network(architecture(trainings.size), seed), images, of, device, ranks=ranks)
        found.append([Judged(epoch.train_loss, epoch.val.loss, epoch.images_per_second) for epoch in done.epochs])
    return found


def _drawn(trainings: Trainings) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images and labels, those to learn from before those to judge by."""
    labels = np.arange(trainings.images + JUDGED) % len(CLASSES)
    drawn = [phantom(CLASSES[label], index, 0, trainings.size) for index, label in enumerate(labels.tolist())]
    return np.stack(drawn), labels


def main() -> None:
    # As the trainer sets it for itself; read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    store, trainings = Path(sys.argv[1]), Trainings(**json.loads(sys.argv[2]))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with _joined(store, rank, world) if world > 1 else nullcontext():
        found = curves(trainings)
        if rank == 0:
            print(json.dumps([[asdict(epoch) for epoch in curve] for curve in found]))


@contextmanager
def _joined(store: Path, rank: int, world: int) -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=world, timeout=_LOST)
    try:
        yield
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
