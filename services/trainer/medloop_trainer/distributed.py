"""A training of many processes: `torchrun --nproc-per-node N -m medloop_trainer train …`.

The first process leads. It does all that one process alone does, is the only one that tracks, stores, exports and
registers, and calls the others for what ranks do together: they read the data set version, and train. A process that
was lost ends all the others; torchrun, told to (`--max-restarts`), starts as many as there are then, and the leader
goes on with the run that its launch began.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from medloop.nets import ServedNetwork, build
from medloop.storage.objects import open_objects
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from medloop_trainer.budget import measure
from medloop_trainer.dataset import Material, gather
from medloop_trainer.device import choose_device
from medloop_trainer.environment import restarts
from medloop_trainer.learn import images_of
from medloop_trainer.loop import fit
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
