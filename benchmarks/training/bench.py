"""The bench that every part works at: one work folder with a home of MedLoop's, an MLflow, and data set versions."""

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

from medloop.data.build import build_dataset
from medloop.data.manifest import Manifest, Split, load_manifest
from medloop.data.sources import Source
from medloop.registry import Registry
from medloop.settings import HomeSettings
from medloop.stack import environment
from medloop.storage.objects import ObjectStore, open_objects

from benchmarks.serving.loop import mlflow_server
from benchmarks.training.runs import write


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command was told. `seeds` None means each part's own; `final` lets the test split be read."""

    sets: tuple[str, ...]
    data: Path
    seeds: tuple[int, ...] | None = None
    final: bool = False
    options: Mapping[str, str | float] = field(default_factory=dict)
    repeats: int = 5
    steps: int = 30
    images: int = 1_000_000

    @property
    def split(self) -> Split:
        return "test" if self.final else "val"

    @property
    def prefix(self) -> str:
        """Before the figures' names: nobody is to take those of `val` for the others."""
        return "" if self.final else "val."


class Bench:
    """Everything is made when it is first needed, under `folder`; what lies there from before is used again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.home = HomeSettings(home=self.folder / "home")
        self.objects: ObjectStore = open_objects(self.objects_url)
        self._open = ExitStack()
        self._manifests: dict[str, Manifest] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    @property
    def objects_url(self) -> str:
        return (self.home.home / "objects").as_uri()

    @cached_property
    def tracking_uri(self) -> str:
        return self._open.enter_context(mlflow_server(self.folder / "mlflow"))

    @cached_property
    def registry(self) -> Registry:
        return Registry(self.tracking_uri)

    def environment(self, model: str) -> dict[str, str]:
        """What a trainer of ours finds in its environment."""
        addresses = {"mlflow": self.tracking_uri}
        return {**environment(self.home.home, model, addresses), "MEDLOOP_OBJECTS_URL": self.objects_url}

    def dataset(self, name: str, mark: str, source: Callable[[], Source]) -> Manifest:
        """The version that `source` makes, built unless it was from what has the same `mark`."""
        if name not in self._manifests:
            known = self.folder / "datasets" / f"{name}.json"
            before = json.loads(known.read_text()) if known.exists() else {}
            if before.get("mark") == mark:
                self._manifests[name] = load_manifest(self.objects, before["id"], name=name)
            else:
                say(f"building {name} …")
                self._manifests[name] = build_dataset(source(), self.objects, name=name).manifest
                write(known, json.dumps({"id": self._manifests[name].id, "mark": mark}))
        return self._manifests[name]


def say(text: str) -> None:
    """Tell a person who waits; results go to standard output."""
    sys.stderr.write(text + "\n")
