"""Checkpoints: everything that a training needs to go on elsewhere, as objects.

    training/<run id>/checkpoint-<step>-<SHA-256>.safetensors

One object is one checkpoint: tensors (the network, its average, the best weights so far, the optimizer's moments), and
in the header's metadata one JSON document (the state and what is trained on what). Nothing is pickled. The store shows
an object whole or not at all, and its name holds the digest of its content, so no pointer is needed: the newest whose
content is what its name says is the one. The last two are kept, so that a damaged one costs no more than the way from
the one before. What went wrong on the way never decides what comes out: any of them leads to the same weights.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from medloop.errors import InvalidRequest, NotFound
from medloop.nets import Architecture
from medloop.storage.objects import ObjectStore
from medloop.vision.prepare import PreparationSpec
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from medloop_trainer.recipe import Recipe
from medloop_trainer.state import State

log = logging.getLogger(__name__)

PREFIX = "training/"
_KEPT = 2
_METADATA = "medloop"


class About(BaseModel):
    """What a run trains, on what, and how: the same in all its checkpoints."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    run_id: str
    model: str
    dataset_id: str
    preparation: PreparationSpec
    architecture: Architecture
    recipe: Recipe
    checkpoint_steps: int
    """At most so many steps lie between two marks (see `loop`)."""
    compiled: bool
    device: str
    threads: int
    packages: dict[str, str]


@dataclass(eq=False)
class Snapshot:
    """A training as it stood: `tensors` are copies on the CPU. `key` is that of the object it was stored as."""

    state: State
    tensors: dict[str, Tensor] = field(repr=False)
    key: str | None = None


class Checkpoints:
    """The checkpoints of one run. Every verb may raise StorageUnavailable, those that write StorageFull."""

    def __init__(self, objects: ObjectStore, about: About) -> None:
        self.about = about
        self._objects = objects
        self._kept: list[str] = []

    def save(self, snapshot: Snapshot) -> None:
        """Store `snapshot` unless it is, and remove all but it and the one that was stored before it."""
        if snapshot.key is None:
            data = pack(self.about, snapshot)
            name = f"checkpoint-{snapshot.state.step:08d}-{hashlib.sha256(data).hexdigest()}.safetensors"
            key = _folder(self.about.run_id) + name
            self._objects.put(key, data)
            snapshot.key = key
        self._kept = [*(key for key in self._kept if key != snapshot.key), snapshot.key][-_KEPT:]
        for key in list(self._objects.list(_folder(self.about.run_id))):
            # While this process knows of one only, what a process before it left stays too.
            if key not in self._kept and len(self._kept) == _KEPT:
                self._objects.delete(key)

    def adopt(self, snapshots: list[Snapshot]) -> None:
        """Go on from `snapshots`, oldest first, which are stored already."""
        self._kept = [snapshot.key for snapshot in snapshots if snapshot.key is not None][-_KEPT:]

    def remove(self) -> None:
        """Remove all of the run's."""
        remove_checkpoints(self._objects, self.about.run_id)


def remove_checkpoints(objects: ObjectStore, run_id: str) -> None:
    for key in list(objects.list(_folder(run_id))):
        objects.delete(key)


def runs_with_checkpoints(objects: ObjectStore) -> set[str]:
    return {key.removeprefix(PREFIX).partition("/")[0] for key in objects.list(PREFIX)}


@dataclass(frozen=True, slots=True)
class Found:
    """Where a run stood last, and the mark that its training would have been taken back to (often the same)."""

    about: About
    last: Snapshot
    mark: Snapshot


def find_checkpoint(objects: ObjectStore, run_id: str) -> Found:
    """The newest checkpoint of a run that is whole; damaged ones are passed over with a warning.

    Raises NotFound when there is none, InvalidRequest when another version of the trainer wrote it.
    """
    whole = _newest_first(objects, run_id)
    try:
        about, last = next(whole)
    except StopIteration:
        raise NotFound(f"There is no checkpoint of run {run_id} in {objects.url}; train anew.") from None
    if last.state.marked == last.state.step:
        return Found(about, last, last)
    for _, other in whole:
        if other.state.step == last.state.marked:
            return Found(about, last, other)
    log.warning("the checkpoint of step %d is gone; one later takes its place", last.state.marked)
    return Found(about, last, last)


def _newest_first(objects: ObjectStore, run_id: str) -> Iterator[tuple[About, Snapshot]]:
    for key in sorted(objects.list(_folder(run_id)), reverse=True):
        data = objects.get(key)
        if hashlib.sha256(data).hexdigest() not in key:
            log.warning("the checkpoint %s is damaged; the one before is looked for", key)
            continue
        about, snapshot = unpack(data)
        snapshot.key = key
        yield about, snapshot


def _folder(run_id: str) -> str:
    return f"{PREFIX}{run_id}/"


def pack(about: About, snapshot: Snapshot) -> bytes:
    """A safetensors file with `about` and the state in its metadata."""
    from safetensors.torch import save

    document = {"about": about.model_dump(mode="json"), "state": snapshot.state.model_dump(mode="json")}
    data: bytes = save(snapshot.tensors, metadata={_METADATA: json.dumps(document)})
    return data


def unpack(data: bytes) -> tuple[About, Snapshot]:
    """What `pack` was given, to the bit; raises InvalidRequest for a document of another version."""
    from safetensors.torch import load

    try:
        document = _document(data)
        about = About.model_validate(document["about"])
        state = State.model_validate(document["state"])
    except (ValidationError, ValueError, KeyError) as exc:
        raise InvalidRequest(
            "The run's checkpoint was written by another version of the trainer; go on with that one, or train anew."
        ) from exc
    return about, Snapshot(state, dict(load(data)))


def _document(data: bytes) -> dict[str, Any]:
    # The format: the header's length (uint64, little endian), the header as JSON, the tensors.
    length = int.from_bytes(data[:8], "little")
    document: dict[str, Any] = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_METADATA])
    return document
