"""Trained runs, one file each: what is done is not done again, however often the benchmark is stopped.

options.json                  what all trainings of this folder were told, so that runs of two kinds never mix
runs/<set>-seed<n>-<…>.json   a `Record`, written whole when its training has ended, and again with each score
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from medloop.data.manifest import Split
from medloop.schemas import Estimate
from pydantic import BaseModel, ConfigDict


@dataclass(frozen=True, slots=True)
class Wanted:
    """A training that is asked for."""

    set: str
    seed: int
    cutmix: bool = True

    @property
    def name(self) -> str:
        return f"{self.set}-seed{self.seed}-{'cutmix' if self.cutmix else 'plain'}"

    @property
    def options(self) -> dict[str, str | int | float]:
        return {"seed": self.seed, **({} if self.cutmix else {"cutmix_probability": 0.0})}


class Scored(BaseModel):
    """The figures of one split; `dropped` are images of it that were not scored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    at: datetime
    images: int
    dropped: int
    accuracy: Estimate
    auc: Estimate


class Record(BaseModel):
    """A training that has ended. `seconds` are of its whole process, or of its last one where it was `resumed`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    set: str
    seed: int
    cutmix: bool
    run_id: str
    version: str
    dataset_id: str
    bundle_digest: str
    git_commit: str | None
    temperature: float
    epochs: int
    best_epoch: int
    seconds: float
    resumed: bool
    scored: dict[Split, Scored] = {}


class Runs:
    """The records under `folder`. `train` makes what is missing; `score` looks at one split of it."""

    def __init__(
        self,
        folder: Path,
        options: Mapping[str, str | float],
        train: Callable[[Wanted], Record],
        score: Callable[[Record, Split], Scored],
    ) -> None:
        """Raises ValueError when the folder's trainings were told something else than `options`."""
        self._folder, self._train, self._score = folder, train, score
        known = folder / "options.json"
        if not known.exists():
            write(known, json.dumps(dict(options)))
        if (before := json.loads(known.read_text())) != options:
            raise ValueError(f"{folder} has runs that were trained with {before}; name another --work for {options}.")

    def get(self, wanted: Wanted, split: Split) -> Record:
        """The record of `wanted`, trained and scored on `split` unless it was before."""
        file = self._folder / "runs" / f"{wanted.name}.json"
        if file.exists():
            record = Record.model_validate_json(file.read_text())
        else:
            record = self._train(wanted)
            write(file, record.model_dump_json(indent=1))
        if split not in record.scored:
            scored = {**record.scored, split: self._score(record, split)}
            record = record.model_copy(update={"scored": scored})
            write(file, record.model_dump_json(indent=1))
        return record


def write(file: Path, text: str) -> None:
    """The whole file or none of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    incoming = file.with_name(f".{file.name}.incoming")
    incoming.write_text(text + "\n")
    incoming.replace(file)
