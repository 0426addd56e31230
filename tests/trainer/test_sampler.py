from collections import Counter

import numpy as np
import pytest
from medloop_trainer.recipe import Options, Recipe
from medloop_trainer.sampler import Sampler, share
from numpy.typing import NDArray

SKEWED = np.repeat([0, 1], [900, 100])


def sampler(labels: NDArray[np.int64], **options: object) -> Sampler:
    chosen = Options.checked(**options)
    recipe = Recipe.settle(chosen, architecture="small-resnet", size=28, images=len(labels), pretrained=None)
    return Sampler(labels, recipe)


def one_pass(of: Sampler, number: int = 0) -> list[NDArray[np.int64]]:
    return [of.batch(number * of.batches + place) for place in range(of.batches)]


def test_with_equal_classes_a_pass_shows_every_image_once() -> None:
    parts = one_pass(sampler(np.arange(40) % 2, batch_size=12))
    assert sorted(np.concatenate(parts).tolist()) == list(range(40))
    assert {len(part) for part in parts} <= {13, 14}


def test_rare_classes_are_shown_by_the_square_root_of_their_size() -> None:
    shown = np.concatenate(one_pass(sampler(SKEWED)))
    assert Counter(SKEWED[shown].tolist()) == {0: 750, 1: 250}  # √900 : √100 = 3 : 1
    of_rare = Counter(shown[SKEWED[shown] == 1].tolist())
    assert set(of_rare.values()) == {2, 3}, "all of a rare class, about as often"
    assert max(Counter(shown[SKEWED[shown] == 0].tolist()).values()) == 1


@pytest.mark.parametrize(("sampling", "rare"), [("natural", 100), ("balanced", 500)])
def test_shares_are_those_of_the_recipe(sampling: str, rare: int) -> None:
    shown = np.concatenate(one_pass(sampler(SKEWED, sampling=sampling)))
    assert (len(shown), int(SKEWED[shown].sum())) == (1000, rare)


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    straight, jumping = sampler(SKEWED), sampler(SKEWED)
    batches = [straight.batch(step) for step in range(40)]
    for step in (33, 2, 39, 2, 0):
        assert np.array_equal(jumping.batch(step), batches[step])
    assert not np.array_equal(sampler(SKEWED, seed=1).batch(0), batches[0])
    assert not np.array_equal(batches[straight.batches], batches[0]), "passes differ"


def test_what_was_shown_is_counted() -> None:
    of = sampler(np.arange(47) % 3, batch_size=10)
    sizes = [len(of.batch(step)) for step in range(11)]
    assert [of.shown(steps) for steps in range(12)] == [0, *np.cumsum(sizes).tolist()]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_a_batch_without_overlap(world: int) -> None:
    batch = sampler(SKEWED).batch(0)
    shares = [share(batch, rank, world) for rank in range(world)]
    assert sorted(np.concatenate(shares).tolist()) == sorted(batch.tolist())
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
