"""What input costs: an epoch beside the same steps on one tensor in memory, input alone beside torchvision's, and how
soon a second run is at work."""

import time
from collections.abc import Callable
from statistics import median

import torch
from medloop_trainer.augment import Augmentation
from medloop_trainer.device import Device, choose_device
from medloop_trainer.images import Images
from medloop_trainer.learner import channels_first
from medloop_trainer.loop import fit
from medloop_trainer.randomness import seed_step
from medloop_trainer.recipe import Recipe
from medloop_trainer.sampler import Sampler
from medloop_trainer.state import Epoch

from benchmarks.training import jpegs
from benchmarks.training.bare import Bare, network, timed
from benchmarks.training.bench import Asked, Bench, say
from benchmarks.training.loader import Peer
from benchmarks.training.material import BATCH, MOVES, architecture, learnt, recipe, saving
from benchmarks.training.process import first_steps
from benchmarks.training.scores import Figures

_WORKERS = (0, 2)
_PROCESSES = 3
"""Fresh processes at most, each of which imports torch first."""


def compare(bench: Bench, asked: Asked) -> Figures:
    device, images = choose_device(), learnt(bench)
    return (
        epoch_over_compute(bench, images, device, asked)
        | alone(bench, images, device, asked.repeats)
        | second_run(bench, min(_PROCESSES, asked.repeats))
    )


def epoch_over_compute(bench: Bench, images: Images, device: Device, asked: Asked) -> Figures:
    """Epochs of the trainer's own loop, checkpoints and all, each followed by the bare loops' same number of steps."""
    say("an epoch beside the same steps in memory …")
    of = recipe(len(images.train), asked.repeats + 1, asked.steps)
    whole, plain = (Bare(architecture(), of, device, images.pixels[:BATCH], whole=whole) for whole in (True, False))
    turns: list[tuple[float, float, float]] = []
    started = time.perf_counter()

    def report(epoch: Epoch) -> None:
        nonlocal started
        ours = time.perf_counter() - started
        turns.append((ours, whole(of.steps_per_epoch), plain(of.steps_per_epoch)))
        started = time.perf_counter()

    with saving(bench, of, device) as saver:
        fit(network(architecture()), images, of, device, saver=saver, report=report)
    del turns[0]  # it warms up
    return {
        "epoch_over_compute": median(ours / theirs for ours, theirs, _ in turns),
        "epoch_over_plain_step": median(ours / theirs for ours, _, theirs in turns),
        "step_ms": 1000 * median(ours for ours, *_ in turns) / of.steps_per_epoch,
    }


def alone(bench: Bench, images: Images, device: Device, repeats: int) -> Figures:
    """Images a second, from where they lie to a changed batch in memory, ours and the peer's in turns."""
    say("input alone …")
    of = recipe(len(images.train), epochs=1, steps=1)  # of which nothing but the changes of images counts here
    contenders: dict[str, Callable[[], int]] = {"ours": lambda: read_all(images, of, device)}
    for workers in _WORKERS:
        contenders[f"imagefolder_{workers}workers"] = Peer(jpegs.folder(bench), MOVES, workers, BATCH).epoch
    turns = [{name: _rate(epoch) for name, epoch in contenders.items()} for _ in range(repeats + 1)]
    del turns[0]  # it starts workers and reads the disk
    figures: Figures = {f"input_images_per_second.{name}": median(turn[name] for turn in turns) for name in contenders}
    for name in contenders:
        if name != "ours":
            figures[f"input_ratio.{name}"] = median(turn["ours"] / turn[name] for turn in turns)
    return figures


def read_all(images: Images, of: Recipe, device: Device) -> int:
    """Choose, read, change and lay out every image once, as the trainer's loop and step do before the network's turn;
    how many there were."""
    sampler, augment = Sampler(images.labels[images.train], of), Augmentation(of, int(images.labels.max()) + 1)
    count = 0
    for step in range(sampler.batches):
        rows = images.train[sampler.batch(step)]
        seed_step(of.seed, step)
        pixels = channels_first(images.pixels[rows], device)
        inputs, _ = augment(pixels, torch.from_numpy(images.labels[rows]).to(device.name), mix=False)
        count += len(inputs.contiguous(memory_format=torch.channels_last))
    return count


def _rate(epoch: Callable[[], int]) -> float:
    counts: list[int] = []
    seconds = timed(lambda: counts.append(epoch()))
    return counts[0] / seconds


def second_run(bench: Bench, repeats: int) -> Figures:
    """Seconds from the beginning of opening to the end of the first step, in fresh processes that find a cache."""
    say("a second run's first step …")
    dataset_id = jpegs.version(bench).id
    first_steps(bench, dataset_id, jpegs.NAME, 1)  # the images are decoded now
    found = [first_steps(bench, dataset_id, jpegs.NAME, 1) for _ in range(repeats)]
    return {
        "second_run_first_step_s": median(each.first_step for each in found),
        "second_run_opened_s": median(each.opened for each in found),
        "second_run_imports_s": median(each.imports for each in found),
    }
