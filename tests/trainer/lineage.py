"""A model with a champion, and data set versions to go on with."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from medloop.data.build import build_dataset
from medloop.data.manifest import CORRECTION, Manifest, Row
from medloop.data.sources import phantom_source
from medloop.registry import CHALLENGER, CHAMPION, Registry, Version
from medloop.storage.objects import ObjectStore, open_objects
from medloop_trainer.progress import Bars
from medloop_trainer.publish import TrainingResult
from medloop_trainer.recipe import Options
from medloop_trainer.settings import TrainerSettings
from medloop_trainer.train import train
from rich.progress import Progress

OPTIONS = {"epochs": 2, "batch_size": 8, "seed": 3}


class HiddenBars(Bars):
    def __init__(self) -> None:
        super().__init__(Progress(disable=True))


@dataclass(frozen=True)
class Lineage:
    """Model `phantoms`: its first version, trained on `first`, is the champion. `second` is `first` and more, and some
    of what is new came from people."""

    home: Path
    objects: ObjectStore
    registry: Registry
    first: Manifest
    second: Manifest
    trained: TrainingResult
    champion: Version

    @property
    def settings(self) -> TrainerSettings:
        return TrainerSettings()

    def version_of(self, rows: Sequence[Row], classes: tuple[str, ...] | None = None) -> Manifest:
        """A stored data set version of the lineage, by itself with its classes."""
        made = Manifest("phantoms", classes or self.first.classes, tuple(rows), self.first.id)
        made.save(self.objects)
        return made


@dataclass(frozen=True)
class Founded:
    """What every lineage begins as: the stores in `folder`, trained once, which is what takes time."""

    folder: Path
    first: Manifest
    second: Manifest
    trained: TrainingResult


@contextmanager
def working_in(folder: Path) -> Iterator[str]:
    """`folder` is `MEDLOOP_HOME` and the working directory; the URI of MLflow's database there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # where MLflow puts artifacts
        patch.setenv("MEDLOOP_HOME", str(folder))
        patch.setenv("MLFLOW_TRACKING_URI", uri := f"sqlite:///{folder / 'mlflow.sqlite'}")
        yield uri


def found(template: Path, folder: Path) -> Founded:
    """Train a champion in `folder`; `template` is an empty database."""
    (folder / "mlflow.sqlite").write_bytes(template.read_bytes())
    with working_in(folder) as uri:
        objects, registry = open_objects((folder / "objects").as_uri()), Registry(uri)
        first = build_dataset(phantom_source(per_class=8, size=28, seed=0), objects).manifest
        more = build_dataset(phantom_source(per_class=10, size=28, seed=0), objects).manifest
        old = {row.byte_hash for row in first.rows}
        rows = [row if row.byte_hash in old else replace(row, source=CORRECTION) for row in more.rows]
        second = Manifest("phantoms", first.classes, tuple(rows), first.id)
        second.save(objects)
        trained = train(TrainerSettings(), first.id, "phantoms", Options.checked(**OPTIONS), HiddenBars())
        registry.set_alias("phantoms", CHAMPION, trained.version)
        registry.delete_alias("phantoms", CHALLENGER)
        return Founded(folder, first, second, trained)


@contextmanager
def lineage_in(folder: Path, founded: Founded) -> Iterator[Lineage]:
    """A copy in `folder`. Artifacts stay where the database says they are; nobody changes those of another run."""
    shutil.copytree(founded.folder, folder, ignore=shutil.ignore_patterns("mlruns"), dirs_exist_ok=True)
    with working_in(folder) as uri:
        objects, registry = open_objects((folder / "objects").as_uri()), Registry(uri)
        champion = registry.version("phantoms", founded.trained.version)
        yield Lineage(folder, objects, registry, founded.first, founded.second, founded.trained, champion)
