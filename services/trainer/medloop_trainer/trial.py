"""One trial: a training like any other, but for checkpoints, calibration, export and a version, which nobody needs."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from medloop.registry import Registry

from medloop_trainer.attempt import Attempt, Pruned, Taken
from medloop_trainer.dataset import Material
from medloop_trainer.device import Device
from medloop_trainer.learn import images_of, set_up
from medloop_trainer.loop import Epoch, Fit, fit
from medloop_trainer.progress import Bars
from medloop_trainer.recipe import Options, Recipe
from medloop_trainer.settings import TrainerSettings
from medloop_trainer.space import options_at
from medloop_trainer.stop import Stop
from medloop_trainer.track import Run, patiently
from medloop_trainer.train import how_it_ended

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Bench:
    """What all trials of this process are made with. `options` is what they have in common; `tags` name the study."""

    settings: TrainerSettings
    registry: Registry
    material: Material
    device: Device
    options: Options
    bars: Bars
    stop: Stop
    study: str
    tags: Mapping[str, str]

    def try_out(self, attempt: Attempt) -> float:
        """Train at the attempt's point, in a run of its own; how good its best epoch is (`Epoch.judged_by`: less is
        better). Raises Pruned, and what `fit` does."""
        run = patiently(self.registry.tracking_uri, lambda: self._start(attempt.number))
        try:
            attempt.note(run_id=run.id)
            fitted = self._train(attempt, run)
        except BaseException as exc:
            run.abandon(*_ended(exc))
            raise
        run.finish(f"a trial: epoch {fitted.best.number} was its best")
        log.info("trial", extra={"trial": attempt.number, "judged_by": fitted.best.judged_by})
        return fitted.best.judged_by

    def _start(self, number: int) -> Run:
        home, dataset_id = self.settings.home.home, self.material.manifest.id
        name, tags = f"{self.study}-trial-{number}", {**self.tags, "medloop.trial": str(number)}
        return Run.start(self.registry, self.material.manifest.name, dataset_id, home=home, name=name, tags=tags)

    def _train(self, attempt: Attempt, run: Run) -> Fit:
        options = Options.checked(**(self.options.model_dump() | options_at(attempt.point)))
        network, recipe = set_up(self.material, options, self.device)
        run.log_params(self._params(recipe))
        best = float("inf")

        def report(epoch: Epoch) -> None:
            nonlocal best
            run.log_epoch(epoch)
            best = min(best, epoch.judged_by)
            self.bars.note("search", f"trial {attempt.number}, epoch {epoch.number}/{recipe.epochs}, {best:.4f}")
            attempt.judge(epoch.number, best, last=epoch.number == recipe.epochs)

        images = images_of(self.material)
        compiled = self.settings.loop.compile
        fitted = fit(network, images, recipe, self.device, stop=self.stop, compiled=compiled, report=report)
        val = fitted.best.val
        attempt.note(best_epoch=fitted.best.number, val_accuracy=val.accuracy, val_auc=val.auc)
        return fitted

    def _params(self, recipe: Recipe) -> dict[str, object]:
        return {
            **recipe.model_dump(exclude={"schema_version"}),
            "dataset_id": self.material.manifest.id,
            "device": self.device.name,
            "threads": self.device.threads,
        }


def _ended(exc: BaseException) -> tuple[str, str]:
    if isinstance(exc, Pruned):
        return "KILLED", f"pruned: {exc}"
    if isinstance(exc, Taken):
        return "KILLED", "not heard of for too long, so another process tries its point again"
    return how_it_ended(exc)
