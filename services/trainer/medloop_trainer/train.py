"""The trainer's story: objects → manifest → cache → network → bundle → MLflow → registry → `challenger`.

A run that was cut off goes on where it stood: trained in part (a checkpoint), trained (a checkpoint of the end),
exported (`MEDLOOP_HOME/training/<run id>`), or registered (nothing is left to do but to tidy up).
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from medloop.data.manifest import Manifest
from medloop.errors import InvalidRequest, MedLoopError, NotFound, Preempted, TrainingFailed
from medloop.registry import Registry, translated
from medloop.schemas import Name
from medloop.storage.disk import disk_errors
from medloop.storage.objects import open_objects
from medloop.vision.prepare import PreparationSpec
from pydantic import TypeAdapter, ValidationError

from medloop_trainer.dataset import Material, gather, look_at
from medloop_trainer.progress import Bars
from medloop_trainer.publish import Finished, TrainingResult, export, read_finished, register
from medloop_trainer.recipe import Options
from medloop_trainer.settings import TrainerSettings
from medloop_trainer.stop import Stop
from medloop_trainer.track import Run

if TYPE_CHECKING:
    from medloop_trainer.checkpoint import About
    from medloop_trainer.learn import Surroundings, Trained
    from medloop_trainer.retrain import Origin

__all__ = ["LATEST", "TrainerSettings", "TrainingResult", "resume", "train"]

log = logging.getLogger(__name__)

LATEST = "latest"
"""Stands for the model's newest run that something is left of."""
_DONE = "FINISHED"  # MLflow's word
_LOOKED_THROUGH = 1000  # runs of the model, newest first


class _Story:
    """What every chapter needs."""

    def __init__(self, settings: TrainerSettings, bars: Bars, stop: Stop) -> None:
        self.settings, self.bars, self.stop = settings, bars, stop
        self.objects = open_objects(settings.storage.objects_url)
        self.registry = Registry(settings.tracking.tracking_uri)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(time.perf_counter() - started, 3)

    def place(self, run_id: str) -> Path:
        return self.settings.home.home / "training" / run_id


def train(
    settings: TrainerSettings,
    dataset_id: str,
    model: str,
    options: Options,
    bars: Bars,
    stop: Stop | None = None,
    origin: "Origin | None" = None,
) -> TrainingResult:
    """Train a network on a stored data set version and register it as the next version of `model`, which is the name
    of the version's lineage; its alias `challenger` then points at it. The network is that of `origin`, or a new one.

    Raises:
        TrackingUnavailable: MLflow does not answer; asked first, before anything is computed.
        NotFound: no such data set version in that lineage.
        InvalidDataset, InvalidRequest: nothing can be learnt from it, or not with these options.
        StorageFull, StorageUnavailable: objects or the home folder cannot be used.
        TrainingFailed: the loss was no number, or the exported network is not the trained one.
        Preempted: `stop` was requested; `resume` goes on.
    """
    check_name(model)
    story = _Story(settings, bars, stop or Stop())
    story.registry.ping()

    def choose(manifest: Manifest) -> PreparationSpec:
        if origin is not None:
            return origin.preparation(manifest, story.objects, settings.home.cache_dir)
        return look_at(manifest, story.objects).spec(options)

    material = _gather(story, dataset_id, model, choose)
    with _running(story, lambda: _started(story, model, material, origin)) as run:
        from medloop_trainer.learn import begin

        with story.step("train"):
            trained = begin(material, options, settings.loop, _around(story, run), origin)
        return _register(story, run, _export(story, run, material, trained))


def resume(
    settings: TrainerSettings,
    run_id: str,
    model: str,
    bars: Bars,
    stop: Stop | None = None,
    dataset_id: str | None = None,
) -> TrainingResult:
    """Go on with a run of `model` that was stopped, killed or could not be registered; `run_id` may be `LATEST`.

    Recipe, data set and seed are the run's own. Raises as `train` does; NotFound when nothing is left of the run, and
    Conflict when another process is at it.
    """
    check_name(model)
    story = _Story(settings, bars, stop or Stop())
    story.registry.ping()
    run_id = _latest(story, model) if run_id == LATEST else run_id
    _check_unfinished(story, run_id)
    finished = read_finished(story.place(run_id))
    if finished is not None:
        _check_same(run_id, finished, model, dataset_id)
        with _running(story, lambda: _resumed(story, run_id)) as run:
            return _register(story, run, finished)

    from medloop_trainer.checkpoint import find_checkpoint

    found = find_checkpoint(story.objects, run_id)
    _check_same(run_id, found.about, model, dataset_id)
    material = _gather(story, found.about.dataset_id, model, lambda _: found.about.preparation)
    with _running(story, lambda: _resumed(story, run_id)) as run:
        from medloop_trainer.learn import go_on

        with story.step("train"):
            trained = go_on(material, found, _around(story, run))
        return _register(story, run, _export(story, run, material, trained))


def check_name(model: str) -> None:
    """Raises InvalidRequest unless `model` can name one."""
    try:
        TypeAdapter(Name).validate_python(model)
    except ValidationError as exc:
        raise InvalidRequest(f"{model!r} cannot name a model; name the data set's lineage.") from exc


def _check_same(run_id: str, subject: "Finished | About", model: str, dataset_id: str | None) -> None:
    if subject.model != model:
        raise InvalidRequest(f"Run {run_id} trains {subject.model}, not {model}; name that one.")
    if dataset_id not in (None, subject.dataset_id):
        raise InvalidRequest(f"Run {run_id} trains on data set {subject.dataset_id}; name that one, or none.")


def _check_unfinished(story: _Story, run_id: str) -> None:
    with translated(story.registry.tracking_uri, f"Run {run_id}"):
        status = story.registry.client.get_run(run_id).info.status
    if status == _DONE:
        _tidy_up(story, run_id)  # what could not be removed when it ended
        raise InvalidRequest(f"Run {run_id} came to its end and is registered; train anew for another version.")


def _latest(story: _Story, model: str) -> str:
    from medloop_trainer.checkpoint import runs_with_checkpoints

    left = runs_with_checkpoints(story.objects)
    folder = story.place("")
    left |= {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    with translated(story.registry.tracking_uri, f"Experiment {model}"):
        experiment = story.registry.client.get_experiment_by_name(model)
        runs = (
            []
            if experiment is None
            else story.registry.client.search_runs(
                [experiment.experiment_id], max_results=_LOOKED_THROUGH, order_by=["attributes.start_time DESC"]
            )
        )
    for run in runs:
        if run.info.run_id in left and run.info.status != _DONE:
            return str(run.info.run_id)
    raise NotFound(f"Nothing is left of any run of {model} that could be gone on with; train anew.")


def _gather(story: _Story, dataset_id: str, model: str, choose: Callable[[Manifest], PreparationSpec]) -> Material:
    # Importing torch takes seconds, which the decoding of images fills.
    with ThreadPoolExecutor(1) as background, story.step("cache"), story.bars.waiting("opening"):
        torch_ready = background.submit(import_torch)
        cache_dir = story.settings.home.cache_dir
        material = gather(story.objects, dataset_id, model, choose, cache_dir, story.bars)
        torch_ready.result()
    return material


def import_torch() -> None:
    """All that a training imports late, which takes longer than everything else before the first step of one that finds
    its images decoded."""
    import torch

    import medloop_trainer.learn  # noqa: F401

    # The first optimizer imports torch's compiler, which takes as long as torch itself.
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], fused=True)


def _started(story: _Story, model: str, material: Material, origin: "Origin | None") -> Run:
    tags = {} if origin is None else origin.parent.tags()
    run = Run.start(story.registry, model, material.manifest.id, home=story.settings.home.home, tags=tags)
    run.log_dataset(material.manifest, story.settings.storage.objects_url)
    return run


def _resumed(story: _Story, run_id: str) -> Run:
    return Run.resume(story.registry, run_id, home=story.settings.home.home)


@contextmanager
def _running(story: _Story, open_run: Callable[[], Run]) -> Iterator[Run]:
    """A run that ends as it should, whatever happens inside, with a folder of its own that goes in the end unless it
    holds a bundle that could not be registered."""
    run = open_run()
    folder = story.place(run.id)
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        yield run
    except BaseException as exc:
        run.abandon(*how_it_ended(exc))
        _tidy_up(story, run.id, exc)
        raise
    run.finish()
    _tidy_up(story, run.id)


def how_it_ended(exc: BaseException) -> tuple[str, str]:
    """The status in MLflow of a run that `exc` ended, and the reason."""
    if isinstance(exc, Preempted):
        return "KILLED", exc.detail
    if isinstance(exc, MedLoopError):
        return "FAILED", f"{exc.code}: {exc.detail}"
    if isinstance(exc, Exception):
        return "FAILED", "internal: see the trainer's log"
    return "KILLED", "stopped"  # Ctrl-C, or SIGTERM by way of SystemExit


def _tidy_up(story: _Story, run_id: str, exc: BaseException | None = None) -> None:
    """Remove what nobody will need: all of it after success, and of a training that failed and would fail again."""
    from medloop_trainer.checkpoint import remove_checkpoints

    folder = story.place(run_id)
    if exc is not None and folder.is_dir() and read_finished(folder) is not None:
        log.warning("the trained bundle was not registered; --resume %s does that", run_id)
    elif folder.is_dir():
        shutil.rmtree(folder)
    if exc is None or isinstance(exc, TrainingFailed):
        try:
            remove_checkpoints(story.objects, run_id)
        except MedLoopError as problem:
            log.warning("the run's checkpoints could not be removed: %s", problem)


def _around(story: _Story, run: Run) -> "Surroundings":
    from medloop_trainer.learn import Surroundings

    return Surroundings(story.objects, run, story.bars, story.stop)


def _export(story: _Story, run: Run, material: Material, trained: "Trained") -> Finished:
    folder = story.place(run.id)
    with story.step("export"), story.bars.waiting("exporting"), disk_errors(folder):
        return export(folder, material, trained)


def _register(story: _Story, run: Run, finished: Finished) -> TrainingResult:
    with story.step("register"), story.bars.waiting("registering"):
        version = register(story.registry, run, story.place(run.id), finished)
    return finished.as_version(version, story.seconds)
