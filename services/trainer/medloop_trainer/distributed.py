"""A training of many processes: `torchrun --nproc-per-node N -m medloop_trainer train …`.

The first process leads. It does all that one process alone does, is the only one that tracks, stores, exports and
registers, and calls the others for what ranks do together: they read the data set version, and train. A process that
was lost ends all the others; torchrun, told to (`--max-restarts`), starts as many as there are then, and the leader
goes on with the run that its launch began. So does the leader of a torchrun that is started again with the same id.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from medloop.nets import ServedNetwork, build
from medloop.registry import TAG_DATASET, TAG_OUTCOME, Registry, translated
from medloop.storage.objects import open_objects
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from medloop_trainer.budget import measure
from medloop_trainer.checkpoint import runs_with_checkpoints
from medloop_trainer.dataset import Material, gather
from medloop_trainer.device import choose_device
from medloop_trainer.environment import TAG_LAUNCH, launch
from medloop_trainer.learn import images_of
from medloop_trainer.loop import fit
from medloop_trainer.publish import read_finished
from medloop_trainer.ranks import Ranks
from medloop_trainer.settings import TrainerSettings
from medloop_trainer.stop import Stop
from medloop_trainer.task import Task

log = logging.getLogger(__name__)

_LONGEST_WAIT = timedelta(hours=12)  # for a leader that decodes or uploads; torchrun itself notices who is gone


@contextmanager
def joined() -> Iterator[Ranks]:
    """Inside, this process is one of those that torchrun started together."""
    # torchrun keeps one store for all its attempts; what an earlier one left there is not for this one.
    store, rank, world = next(iter(rendezvous("env://")))
    own = PrefixStore(f"medloop/{restarts()}/{world}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=_LONGEST_WAIT)
    try:
        ranks = Ranks.present()
        yield ranks
        if ranks.leads:
            ranks.leaders_text("")  # nothing is left to do
    finally:
        dist.destroy_process_group()


def follow(settings: TrainerSettings, ranks: Ranks, stop: Stop) -> None:
    """Do what the leader calls for, until it needs nothing more. Raises what `fit` does, and Unavailable when another
    process is gone."""
    logging.getLogger().setLevel(logging.ERROR)  # the leader says the same
    while text := ranks.leaders_text(""):
        task = Task.model_validate_json(text)
        first = os.environ["LOCAL_RANK"] == "0"
        material = _gathered(settings, task) if first else None
        ranks.wait()
        _join_in(task, material or _gathered(settings, task), ranks, stop)


def _gathered(settings: TrainerSettings, task: Task) -> Material:
    objects = open_objects(settings.storage.objects_url)
    return gather(objects, task.dataset_id, task.model, lambda _: task.preparation, settings.home.cache_dir)


def _join_in(task: Task, material: Material, ranks: Ranks, stop: Stop) -> None:
    unset = [1.0]  # normalisation is among the network's tensors, which are the leader's
    network = ServedNetwork(task.architecture, build(task.architecture), unset, unset)
    images = images_of(material, task.recipe.correction_weight)
    device = choose_device()
    if task.purpose == "measure":
        measure(network, images, task.recipe, device, compiled=task.compiled, ranks=ranks)
    else:
        steps, compiled = task.checkpoint_steps, task.compiled
        fit(network, images, task.recipe, device, ranks=ranks, stop=stop, checkpoint_steps=steps, compiled=compiled)


def restarts() -> int:
    """How often torchrun started its processes anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def begun_run(settings: TrainerSettings, model: str, dataset_id: str | None) -> str | None:
    """The run that this launch began on the data set version (on any, for None) before its processes were started anew,
    by torchrun or with it, if anything is left of it to go on with. Raises what MLflow and objects do when they do not
    answer."""
    own = launch()
    if own is None:
        if restarts() > 0:
            log.warning("torchrun was given no --rdzv-id, so that no run is known to go on with; training begins anew")
        return None
    registry = Registry(settings.tracking.tracking_uri)
    run_id = _newest_of(registry, model, own, dataset_id)
    if run_id is None:
        return None
    if run_id in runs_with_checkpoints(open_objects(settings.storage.objects_url)):
        return run_id
    if read_finished(settings.home.home / "training" / run_id) is not None:
        return run_id
    with translated(registry.tracking_uri, f"Run {run_id}"):
        registry.client.set_tag(run_id, TAG_OUTCOME, "killed before its first checkpoint")
        registry.client.set_terminated(run_id, "KILLED")
    return None


def _newest_of(registry: Registry, model: str, launch_id: str, dataset_id: str | None) -> str | None:
    """Of the launch's runs, the newest one, unless that came to its end."""
    with translated(registry.tracking_uri, f"Experiment {model}"):
        experiment = registry.client.get_experiment_by_name(model)
        if experiment is None:
            return None
        wanted = f"tags.`{TAG_LAUNCH}` = '{launch_id}'"
        if dataset_id is not None:
            wanted += f" and tags.`{TAG_DATASET}` = '{dataset_id}'"
        newest = ["attributes.start_time DESC"]
        found = registry.client.search_runs([experiment.experiment_id], wanted, max_results=1, order_by=newest)
    ended = not found or found[0].info.status == "FINISHED"
    return None if ended else str(found[0].info.run_id)
