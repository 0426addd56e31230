"""The search's story: data set → study → trials → what they say, and perhaps a training with the best options.

Everything is decided on the validation split; the test split is not looked at. What the best of many trials scores
there flatters it, as the best of many always does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medloop.errors import TrainingFailed
from medloop.registry import Registry
from medloop.storage.objects import open_objects
from pydantic import BaseModel

from medloop_trainer.dataset import Material, gather, look_at
from medloop_trainer.parent import TAG_PARENT, TAG_STUDY, Parent, mark_dead
from medloop_trainer.progress import Bars
from medloop_trainer.publish import TrainingResult
from medloop_trainer.recipe import Options
from medloop_trainer.settings import TrainerSettings
from medloop_trainer.space import FIRST_LOOK, SEARCHED, Space, flags, options_at, point_of
from medloop_trainer.stop import Stop
from medloop_trainer.track import create_run
from medloop_trainer.train import check_name, train

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from medloop_trainer.study import Study
    from medloop_trainer.trial import Bench

_NAMED = 12  # digits of the data set's id in a study's name
_OF_TRIALS, _OF_TRAINING = {"preset", "epochs"}, {"budget_minutes"}
"""What is said of trials, and not of the training that follows; and the other way round."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How long to search: until the study has `trials`, all processes' together, or for `minutes`. `study` is named
    after model and data set by itself; `train` asks for a training with what was best."""

    trials: int = 30
    minutes: float | None = None
    study: str | None = None
    train: bool = False


class BestTrial(BaseModel):
    """`judged_by` is the validation loss (nats) at its own best temperature, `recipe_judged_by` that of the trial that
    has the recipe's own options, None if it did not come to its end."""

    number: int
    judged_by: float
    recipe_judged_by: float | None
    val_accuracy: float
    val_auc: float | None
    options: dict[str, bool | int | float]


class SearchResult(BaseModel):
    """What a search says on its last line. `flags` are the best options as arguments of `train`; `importance` has
    shares of 1, and nothing while there are too few trials."""

    model: str
    dataset_id: str
    study: str
    run_id: str
    trials: dict[str, int]
    best: BestTrial | None
    flags: list[str]
    importance: dict[str, float]
    trained: TrainingResult | None = None


def search(
    settings: TrainerSettings,
    dataset_id: str,
    model: str,
    given: Mapping[str, object],
    plan: Plan,
    bars: Bars,
    stop: Stop | None = None,
) -> SearchResult:
    """Look for the options that train `model` best on a data set version.

    `given` are options that all trials have, and so has the training after them, but for `preset` and `epochs`;
    `budget_minutes` is of that training only.

    Raises:
        TrackingUnavailable, StorageUnavailable, StorageFull: MLflow, objects, the database or the home folder cannot be
            used; the same call goes on later.
        NotFound, InvalidDataset, InvalidRequest: as `train` does.
        Conflict: a study of that name is about something else.
        Preempted: `stop` was requested; the same call goes on.
        TrainingFailed: there is nothing to train with, as no trial came to its end.
    """
    check_name(model)
    stop = stop or Stop()
    options = Options.checked(**{"preset": "quick"} | _without(given, _OF_TRAINING))
    registry = Registry(settings.tracking.tracking_uri)
    registry.ping()
    objects = open_objects(settings.storage.objects_url)
    material = gather(
        objects, dataset_id, model, lambda found: look_at(found, objects).spec(options), settings.home.cache_dir, bars
    )
    study, space, bench = _set_out(settings, registry, material, options, plan, bars, stop)
    parent = Parent(registry, study.run_id, study.busy)
    with parent.running():
        study.work(
            bench.try_out,
            trials=plan.trials,
            stop=stop,
            seconds=float("inf") if plan.minutes is None else 60 * plan.minutes,
            watch=lambda ended: bars("search", min(ended, plan.trials), plan.trials),
        )
        result = _said(study, model, dataset_id, given)
        parent.keep(_files(study, space, result), {f"trials_{state}": n for state, n in result.trials.items()})
    if not plan.train:
        return result
    if result.best is None:
        raise TrainingFailed(f"No trial of study {study.name} came to its end; give it more --trials or --minutes.")
    chosen = Options.checked(**_without(given, _OF_TRIALS) | result.best.options)
    trained = train(settings, dataset_id, model, chosen, bars, stop)
    return result.model_copy(update={"trained": trained})


def _without(given: Mapping[str, object], names: set[str]) -> dict[str, object]:
    return {name: value for name, value in given.items() if name not in names}


def _set_out(
    settings: TrainerSettings,
    registry: Registry,
    material: Material,
    options: Options,
    plan: Plan,
    bars: Bars,
    stop: Stop,
) -> "tuple[Study, Space, Bench]":
    # Both load libraries for seconds, which is in vain where the request cannot be met.
    from medloop_trainer.device import choose_device
    from medloop_trainer.learn import set_up
    from medloop_trainer.study import Bound, open_study
    from medloop_trainer.trial import Bench

    device = choose_device()
    recipe = set_up(material, options, device)[1]
    model, dataset_id = material.manifest.name, material.manifest.id
    name = plan.study or f"{model}-{dataset_id[:_NAMED]}"
    bound = Bound(
        model=model,
        dataset_id=dataset_id,
        preparation=material.spec,
        space=Space.around(recipe, len(material.rows.train)),
        trial=options.model_dump(mode="json", exclude=set(SEARCHED)),
    )

    study = open_study(
        settings.search.url(model, settings.home.home),
        name,
        bound,
        start=point_of(recipe),
        first_look=max(1, round(FIRST_LOOK * recipe.epochs)),
        make_run=lambda: create_run(registry, model, dataset_id, name=name, tags={TAG_STUDY: name}),
        mourn=lambda run_id: mark_dead(registry, run_id),
    )
    tags = {TAG_PARENT: study.run_id, TAG_STUDY: name}
    return study, bound.space, Bench(settings, registry, material, device, options, bars, stop, name, tags)


def _said(study: "Study", model: str, dataset_id: str, given: Mapping[str, object]) -> SearchResult:
    best, importance, counts = study.best(), study.importance(), study.counts()
    found = None if best is None else _best(best, study.trials())
    return SearchResult(
        model=model,
        dataset_id=dataset_id,
        study=study.name,
        run_id=study.run_id,
        trials=dict(counts),
        best=found,
        flags=[] if found is None else flags(_without(given, _OF_TRIALS) | found.options),
        importance=importance,
    )


def _best(best: "FrozenTrial", trials: "Sequence[FrozenTrial]") -> BestTrial:
    from medloop_trainer.study import state_of

    own = [t.value for t in trials if t.user_attrs.get("recipe") and state_of(t) == "complete"]
    return BestTrial(
        number=best.number,
        judged_by=best.value,
        recipe_judged_by=own[0] if own else None,
        val_accuracy=best.user_attrs["val_accuracy"],
        val_auc=best.user_attrs["val_auc"],
        options=options_at(best.params),
    )


def _files(study: "Study", space: Space, result: SearchResult) -> dict[str, str | bytes]:
    from medloop_trainer.findings import importance_png, trials_csv

    files: dict[str, str | bytes] = {"trials.csv": trials_csv(study.trials(), space)}
    if result.importance:
        files["importance.png"] = importance_png(result.importance, result.trials["complete"])
    return files
