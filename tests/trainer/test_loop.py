import copy
import logging
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from medloop.errors import NotFound, Preempted, TrainingFailed
from medloop.nets import ServedNetwork
from medloop_trainer.checkpoint import Checkpoints, Snapshot, find_checkpoint
from medloop_trainer.device import Device
from medloop_trainer.loop import Epoch, Fit, Images, fit, logits_of
from medloop_trainer.recipe import Recipe
from medloop_trainer.saver import Saver
from medloop_trainer.schedule import one_cycle
from medloop_trainer.scores import score
from medloop_trainer.stop import Stop
from torch import Tensor, nn

from .stores import DyingObjects, Killed, MemoryObjects
from .tiny import equal, tiny_about, tiny_images, tiny_network, tiny_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY = 3  # steps between marks; an epoch of these tests has 4


class Fragile(nn.Module):
    """Weights that make everything NaN once one of them is `limit` away from where it began."""

    weight: Tensor
    began: Tensor

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.weight = nn.Parameter(torch.ones(8))
        self.register_buffer("began", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        broken = (self.weight.detach() - self.began).abs().max() > self.limit
        return x * self.weight * torch.where(broken, torch.nan, 1.0)


def fragile_network(limit: float) -> ServedNetwork:
    network = tiny_network()
    network.classifier.neck.append(Fragile(limit))  # type: ignore[operator]
    return network


def trained(images: Images, device: Device, recipe: Recipe, **hooks: Any) -> tuple[ServedNetwork, Fit]:
    network = tiny_network(recipe.seed)
    return network, fit(network, images, recipe, device, **hooks)


def go_on(network: ServedNetwork, images: Images, device: Device, recipe: Recipe, objects: MemoryObjects) -> Fit:
    """Train `network` as a process of its own would: from the last checkpoint, if there is one."""
    checkpoints = Checkpoints(objects, tiny_about(recipe))
    start: tuple[Snapshot, Snapshot] | None = None
    with suppress(NotFound):  # it was killed before it stored one, and begins anew
        found = find_checkpoint(objects, checkpoints.about.run_id)
        start = (found.last, found.mark)
        checkpoints.adopt([found.mark, found.last])
    with Saver(checkpoints, pause=0) as saver:
        return fit(network, images, recipe, device, start=start, saver=saver, checkpoint_steps=EVERY)


def stopped_at(
    step: int, network: ServedNetwork, images: Images, device: Device, recipe: Recipe, objects: MemoryObjects
) -> None:
    """Train until SIGTERM comes during step `step`."""
    stop = Stop()

    def progress(_: str, shown: int, __: int) -> None:
        stop.requested |= shown >= 10 * step

    with Saver(Checkpoints(objects, tiny_about(recipe)), pause=0) as saver, pytest.raises(Preempted, match="--resume"):
        fit(network, images, recipe, device, saver=saver, stop=stop, checkpoint_steps=EVERY, progress=progress)


def without_times(found: Fit) -> list[Epoch]:
    return [replace(epoch, images_per_second=0, input_wait_share=0) for epoch in found.epochs]


def test_the_same_seed_gives_the_same_weights_to_the_bit(images: Images, device: Device) -> None:
    one = trained(images, device, tiny_recipe(seed=1))[0]
    torch.rand(5)  # whatever else draws from torch's generator
    assert equal(one, trained(images, device, tiny_recipe(seed=1))[0])
    assert not equal(one, trained(images, device, tiny_recipe(seed=2))[0])


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_what_differs_is_learnt_and_the_best_epoch_is_kept(images: Images, device: Device, ema_decay: float) -> None:
    seen: list[Epoch] = []
    calls: list[tuple[str, int, int]] = []
    recipe = tiny_recipe(epochs=6, ema_decay=ema_decay, learning_rate=0.03)
    network, found = trained(images, device, recipe, report=seen.append, progress=lambda *call: calls.append(call))
    assert found.best.val.accuracy == 1.0
    assert found.best == min(seen, key=lambda epoch: epoch.judged_by)
    assert tuple(seen) == found.epochs
    assert [epoch.number for epoch in seen] == [1, 2, 3, 4, 5, 6]
    kept = score(logits_of(network, images.pixels[images.val], device), images.labels[images.val])
    assert kept.loss == pytest.approx(found.best.val.loss, rel=1e-6)
    assert calls[-1] == ("training", 240, 240)
    assert found.images_per_second > 0
    assert all(0 <= epoch.input_wait_share < 1 for epoch in seen)


def test_patience_ends_a_training_that_gets_no_better(images: Images, device: Device) -> None:
    shuffled = replace(images, labels=np.random.default_rng(0).permutation(images.labels))
    found = trained(shuffled, device, tiny_recipe(epochs=40, patience=2, learning_rate=0.03))[1]
    assert len(found.epochs) == found.best.number + 2 < 40


def test_stopped_at_any_step_it_ends_with_the_same_weights(images: Images, device: Device) -> None:
    recipe = tiny_recipe(epochs=3)
    whole, expected = trained(images, device, recipe, checkpoint_steps=EVERY)
    for step in range(1, 12):
        objects, network = MemoryObjects(), tiny_network()
        stopped_at(step, tiny_network(), images, device, recipe, objects)
        assert find_checkpoint(objects, "a" * 32).last.state.step == step
        found = go_on(network, images, device, recipe, objects)
        assert equal(network, whole), step
        assert without_times(found) == without_times(expected)
        assert found.best.number == expected.best.number


@pytest.mark.parametrize("step", [2, 6, 7, 10])
def test_a_loss_that_is_no_number_costs_one_lower_rate_also_across_a_stop(
    step: int, images: Images, device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = tiny_recipe(epochs=3, learning_rate=0.02)
    whole = fragile_network(0.08)
    with caplog.at_level(logging.WARNING):
        fit(whole, images, recipe, device, checkpoint_steps=EVERY)
    assert caplog.text.count("the loss is no number") == 1
    objects, network = MemoryObjects(), fragile_network(0.08)
    stopped_at(step, fragile_network(0.08), images, device, recipe, objects)
    go_on(network, images, device, recipe, objects)
    assert equal(network, whole)


def test_a_loss_that_stays_no_number_ends_the_training(images: Images, device: Device) -> None:
    with pytest.raises(
        TrainingFailed, match=r"in epoch 1, also after .* choose a smaller --learning-rate than 0\.00075"
    ):
        fit(fragile_network(0.0), images, tiny_recipe(), device)


@settings(max_examples=20, deadline=None)
@given(kills=st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=3), damaged=st.booleans())
def test_killed_at_any_step_of_checkpointing_it_ends_with_the_same_weights(
    kills: list[tuple[int, bool]], damaged: bool, uninterrupted: ServedNetwork
) -> None:
    images, device, recipe = IMAGES, Device("cpu", torch.float32, torch.get_num_threads()), RECIPE
    objects = DyingObjects()
    for writes, after in kills:
        objects.die(writes, after=after)
        try:
            go_on(tiny_network(), images, device, recipe, objects)
        except Killed:
            objects.revive()
    if damaged and objects.content:
        objects.content[max(objects.content)] = b"torn"
    network = tiny_network()
    objects.revive()
    go_on(network, images, device, recipe, objects)
    assert equal(network, uninterrupted)


IMAGES, RECIPE = tiny_images(), tiny_recipe(epochs=3)


@pytest.fixture(scope="module")
def uninterrupted() -> ServedNetwork:
    device = Device("cpu", torch.float32, torch.get_num_threads())
    return trained(IMAGES, device, RECIPE, checkpoint_steps=EVERY)[0]


def test_a_store_that_comes_and_goes_changes_nothing(images: Images, device: Device) -> None:
    recipe, objects, network = tiny_recipe(epochs=3), MemoryObjects(), tiny_network()

    def progress(_: str, shown: int, __: int) -> None:
        objects.away = shown % 40 < 30

    with Saver(Checkpoints(objects, tiny_about(recipe)), pause=0) as saver:
        fit(network, images, recipe, device, saver=saver, checkpoint_steps=EVERY, progress=progress)
        objects.away = False
    assert equal(network, trained(images, device, recipe, checkpoint_steps=EVERY)[0])


def test_an_epoch_may_be_shorter_than_a_pass(images: Images, device: Device) -> None:
    recipe = tiny_recipe(epochs=3).model_copy(update={"steps_per_epoch": 3})
    found = trained(images, device, recipe)[1]
    assert [epoch.number for epoch in found.epochs] == [1, 2, 3]


def test_scoring_does_not_depend_on_the_batch(images: Images, device: Device) -> None:
    network = copy.deepcopy(trained(images, device, tiny_recipe(epochs=1))[0])
    together = logits_of(network, images.pixels, device)
    alone = np.concatenate([logits_of(network, images.pixels[i : i + 1], device) for i in range(5)])
    np.testing.assert_allclose(together[:5], alone, atol=1e-4)


@pytest.mark.parametrize("warm_up", [0.0, 0.25])
def test_the_learning_rate_rises_and_falls_once(warm_up: float) -> None:
    rates = [one_cycle(share, warm_up) for share in np.linspace(0, 1, 101)]
    peak = int(np.argmax(rates))
    assert rates[peak] == pytest.approx(1)
    assert peak == 100 * warm_up
    assert rates[0] == pytest.approx(1 / 25 if warm_up else 1)
    assert rates[-1] == pytest.approx(1 / 1000)
    assert (np.diff(rates[: peak + 1]) > 0).all()
    assert (np.diff(rates[peak:]) < 0).all()
