import hashlib
import logging

import pytest
import torch
from medloop.errors import InvalidRequest, NotFound
from medloop_trainer.checkpoint import (
    Checkpoints,
    Snapshot,
    find_checkpoint,
    pack,
    remove_checkpoints,
    runs_with_checkpoints,
    unpack,
)
from medloop_trainer.scores import Scores
from medloop_trainer.state import Epoch, State

from .stores import MemoryObjects
from .tiny import tiny_about, tiny_recipe

ABOUT = tiny_about(tiny_recipe())


def snapshot(step: int, marked: int | None = None) -> Snapshot:
    epoch = Epoch(1, 0.1 + 0.2, Scores(float("inf"), 1 / 3, None), float("nan"), 1e-300, 3.0)
    tensors = {"model.weight": torch.tensor([[0.1, -0.0], [torch.inf, 1e-45]]), "optimizer.0.step": torch.tensor(7.0)}
    return Snapshot(State(step=step, marked=step if marked is None else marked, epochs=[epoch], best=1), tensors)


def steps(objects: MemoryObjects) -> list[int]:
    return [int(key.split("-")[1]) for key in objects.list()]


def test_everything_comes_back_to_the_bit() -> None:
    given = snapshot(3)
    about, found = unpack(pack(ABOUT, given))
    assert about == ABOUT
    assert repr(found.state) == repr(given.state)  # nan is not equal to itself
    assert found.tensors.keys() == given.tensors.keys()
    for name, tensor in given.tensors.items():
        assert found.tensors[name].numpy().tobytes() == tensor.numpy().tobytes()


def test_the_last_two_are_kept() -> None:
    objects = MemoryObjects()
    checkpoints = Checkpoints(objects, ABOUT)
    for step in (0, 3, 6, 9):
        checkpoints.save(snapshot(step))
    assert steps(objects) == [6, 9]
    assert find_checkpoint(objects, ABOUT.run_id).last.state.step == 9
    assert runs_with_checkpoints(objects) == {ABOUT.run_id}
    remove_checkpoints(objects, ABOUT.run_id)
    assert not objects.content


@pytest.mark.parametrize("damage", [b"", b"x" * 100, None])
def test_of_a_damaged_one_the_one_before_is_taken(damage: bytes | None, caplog: pytest.LogCaptureFixture) -> None:
    objects = MemoryObjects()
    checkpoints = Checkpoints(objects, ABOUT)
    for step in (3, 6):
        checkpoints.save(snapshot(step))
    newest = max(objects.content)
    whole = objects.content[newest]
    objects.content[newest] = whole[:-1] + bytes([whole[-1] ^ 1]) if damage is None else damage
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(objects, ABOUT.run_id).last.state.step == 3
    assert f"{newest} is damaged" in caplog.text
    objects.content[min(objects.content)] = b""
    with pytest.raises(NotFound, match=f"no checkpoint of run {ABOUT.run_id}"):
        find_checkpoint(objects, ABOUT.run_id)


def test_the_mark_before_a_stop_is_kept_beside_it_however_often_it_stops() -> None:
    objects = MemoryObjects()
    mark = snapshot(6)
    checkpoints = Checkpoints(objects, ABOUT)
    for each in (snapshot(3), mark, snapshot(7, marked=6)):
        checkpoints.save(each)
    found = find_checkpoint(objects, ABOUT.run_id)
    assert (found.last.state.step, found.mark.state.step) == (7, 6)

    again = Checkpoints(objects, ABOUT)
    again.adopt([found.mark, found.last])
    writes = objects.writes
    again.save(found.mark)
    assert objects.writes == writes, "it is stored already"
    again.save(snapshot(8, marked=6))
    assert steps(objects) == [6, 8]


def test_another_version_s_checkpoint_is_not_guessed_at() -> None:
    objects = MemoryObjects()
    data = pack(ABOUT.model_copy(update={"schema_version": 99}), snapshot(3))
    key = f"training/{ABOUT.run_id}/checkpoint-00000003-{hashlib.sha256(data).hexdigest()}.safetensors"
    objects.put(key, data)
    with pytest.raises(InvalidRequest, match="another version of the trainer"):
        find_checkpoint(objects, ABOUT.run_id)
