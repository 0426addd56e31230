"""The real trainer as a process of its own, begun or gone on with."""

import time

from medloop.errors import InvalidRequest, NotFound
from medloop.pipeline import Training, run_trainer
from medloop.registry import fetch_bundle
from medloop.storage.objects import ObjectStore

from benchmarks.training.bench import Asked, Bench, say
from benchmarks.training.runs import Record, Wanted


def train(bench: Bench, asked: Asked, wanted: Wanted, dataset_id: str) -> Record:
    """Train what is wanted; where an attempt was cut off before, from its last checkpoint."""
    left = unfinished(bench.objects, wanted, dataset_id)
    say(f"{wanted.name}: {'training' if left is None else f'going on with run {left}'} …")
    options = {**asked.options, **wanted.options} if left is None else {"resume": left}
    started = time.perf_counter()
    done = run_trainer(Training(dataset_id, wanted.set, options), bench.environment(wanted.set))
    seconds = time.perf_counter() - started
    version = bench.registry.version(wanted.set, done["version"])
    card = fetch_bundle(bench.registry, version, bench.home.bundles_dir).card
    return Record(
        set=wanted.set,
        seed=wanted.seed,
        cutmix=wanted.cutmix,
        run_id=done["run_id"],
        version=done["version"],
        dataset_id=done["dataset_id"],
        bundle_digest=done["bundle_digest"],
        git_commit=card.git_commit,
        temperature=card.temperature,
        epochs=done["epochs"],
        best_epoch=done["best_epoch"],
        seconds=round(seconds, 1),
        resumed=left is not None,
    )


def unfinished(objects: ObjectStore, wanted: Wanted, dataset_id: str) -> str | None:
    """The run that was to become `wanted` and has left a checkpoint; the trainer removes those of runs that ended."""
    if next(objects.list("training/"), None) is None:
        return None
    from medloop_trainer.checkpoint import find_checkpoint, runs_with_checkpoints  # with torch, which takes seconds

    for run_id in sorted(runs_with_checkpoints(objects)):
        try:
            about = find_checkpoint(objects, run_id).about
        except (NotFound, InvalidRequest) as exc:
            say(f"run {run_id} cannot be gone on with: {exc.detail}")
            continue
        found = Wanted(about.model, about.recipe.seed, about.recipe.cutmix_probability > 0)
        if (found, about.dataset_id) == (wanted, dataset_id):
            return run_id
    return None
