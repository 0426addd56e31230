"""What a run left in MLflow, as far as training again needs it, and what was around it."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from medloop.bundle import CARD, Card, read_card
from medloop.errors import InvalidRequest
from medloop.registry import BUNDLE_PATH, TAG_OUTCOME, Registry, translated
from pydantic import BaseModel

from medloop_trainer.recipe import Recipe
from medloop_trainer.track import TRAINING_PATH

TAG_REPRODUCES = "medloop.reproduces"
"""Of a run: the run whose training it did again."""
CURVES = ("val_loss", "val_accuracy", "val_auc", "judged_by")
"""Metrics of an epoch that say how good the network was."""

_RECIPE = "recipe.json"
_COMMIT, _DIRTY = "mlflow.source.git.commit", "mlflow.source.git.dirty"
_TAGS = ("medloop.environment", "medloop.cpu", "medloop.gpus")
_DONE = "FINISHED"  # MLflow's word


@dataclass(frozen=True, slots=True)
class Original:
    """`curves` are by metric and epoch; the rest is as it was logged."""

    run_id: str
    card: Card
    recipe: Recipe
    params: Mapping[str, str]
    tags: Mapping[str, str]
    figures: Mapping[str, float]
    curves: Mapping[str, Mapping[int, float]]


class Difference(BaseModel):
    """Something that a training may depend on and that is not as it was; None where there is, or was, no such thing."""

    what: str
    then: str | None
    now: str | None


def read_original(registry: Registry, run_id: str) -> Original:
    """Raises NotFound, TrackingUnavailable, and InvalidRequest for a run that cannot be reproduced."""
    with translated(registry.tracking_uri, f"Run {run_id}"):
        found = registry.client.get_run(run_id)
        data = found.data
        if (other := data.tags.get(TAG_REPRODUCES)) is not None:
            raise InvalidRequest(f"Run {run_id} reproduces run {other} itself; reproduce that one.")
        outcome = data.tags.get(TAG_OUTCOME)
        if outcome is not None or found.info.status != _DONE:
            raise InvalidRequest(
                f"Run {run_id} made no model version ({outcome or found.info.status.lower()}); only a run that did "
                "can be reproduced."
            )
        recipe = Recipe.read(_artifact(registry, run_id, TRAINING_PATH, _RECIPE))
        card = read_card(_artifact(registry, run_id, BUNDLE_PATH, CARD))
        curves = {name: _history(registry, run_id, name) for name in CURVES}
    return Original(run_id, card, recipe, data.params, data.tags, data.metrics, curves)


def differences(
    original: Original, params: Mapping[str, object], packages: Mapping[str, str], tags: Mapping[str, str]
) -> list[Difference]:
    """What is otherwise now: of the parameters that the run logged, of its packages and of its surroundings."""
    then_tags, then_packages = original.tags, original.card.packages
    pairs: dict[str, tuple[str | None, str | None]] = {"git": (_code(then_tags), _code(tags))}
    pairs |= {name: (then_tags.get(name), tags.get(name)) for name in _TAGS}
    names = dict.fromkeys([*then_packages, *packages])
    pairs |= {name: (then_packages.get(name), packages.get(name)) for name in names}
    pairs |= {name: (original.params[name], str(value)) for name, value in params.items() if name in original.params}
    # Two states of the code that were never committed are not known to be the same.
    return [
        Difference(what=name, then=then, now=now)
        for name, (then, now) in pairs.items()
        if then != now or (then is not None and then.endswith(_CHANGED))
    ]


_CHANGED = " with changes"


def _code(tags: Mapping[str, str]) -> str | None:
    commit = tags.get(_COMMIT)
    return commit and commit + (_CHANGED if tags.get(_DIRTY) == "true" else "")


def _artifact(registry: Registry, run_id: str, folder: str, name: str) -> bytes:
    path = f"{folder}/{name}"
    if path not in {file.path for file in registry.client.list_artifacts(run_id, folder)}:
        raise InvalidRequest(f"Run {run_id} has no {path}: it is no training that made a model version.")
    with tempfile.TemporaryDirectory(prefix="medloop-") as scratch:
        return Path(registry.client.download_artifacts(run_id, path, scratch)).read_bytes()


def _history(registry: Registry, run_id: str, metric: str) -> dict[int, float]:
    # An epoch that was done again after the loss was no number stands there twice, and the later one counts.
    found = sorted(registry.client.get_metric_history(run_id, metric), key=lambda entry: entry.timestamp)
    return {entry.step: entry.value for entry in found}
