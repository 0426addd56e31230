"""The run that a launch began: what its processes, started anew after one of them was lost, go on with.

A launch has an id, which is tagged on its runs: torchrun's, or the one that an orchestrator gives to all Pods of a Job.
"""

import logging

from medloop.registry import TAG_DATASET, TAG_OUTCOME, Registry, translated
from medloop.storage.objects import open_objects

from medloop_trainer.environment import TAG_LAUNCH, launch, restarts
from medloop_trainer.publish import read_finished
from medloop_trainer.settings import TrainerSettings

log = logging.getLogger(__name__)


def begun_run(settings: TrainerSettings, model: str, dataset_id: str | None) -> str | None:
    """The run of `model` that this launch began on the data set version (on any, for None) before, if anything is left
    of it to go on with. Raises what MLflow and objects do when they do not answer."""
    own = launch()
    if own is None:
        if restarts() > 0:
            log.warning("torchrun was given no --rdzv-id, so that no run is known to go on with; training begins anew")
        return None
    registry = Registry(settings.tracking.tracking_uri)
    run_id = _newest_of(registry, model, own, dataset_id)
    if run_id is None or _is_left(settings, run_id):
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


def _is_left(settings: TrainerSettings, run_id: str) -> bool:
    from medloop_trainer.checkpoint import runs_with_checkpoints  # with torch, which takes seconds

    if run_id in runs_with_checkpoints(open_objects(settings.storage.objects_url)):
        return True
    return read_finished(settings.home.home / "training" / run_id) is not None
