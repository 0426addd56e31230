from collections import Counter

import numpy as np
import pytest
from medloop_trainer.recipe import Options, Recipe
from medloop_trainer.sampler import WINDOW, Sampler, share
from numpy.typing import NDArray

SKEWED = np.repeat([0, 1], [900, 100])


def sampler(labels: NDArray[np.int64], shards: NDArray[np.int32] | None = None, **options: object) -> Sampler:
    chosen = Options.checked(**options)
    recipe = Recipe.settle(chosen, architecture="small-resnet", size=28, images=len(labels), pretrained=None)
    return Sampler(labels, recipe, shards)


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


SHARDED = (np.arange(1000) // 20).astype(np.int32)  # 50 shards: four windows


@pytest.mark.parametrize("labels", [np.arange(1000) % 2, np.random.default_rng(0).permutation(SKEWED)])
def test_of_many_shards_a_pass_shows_one_window_after_another(labels: NDArray[np.int64]) -> None:
    of, plain = sampler(labels, SHARDED, batch_size=10), sampler(labels, batch_size=10)
    assert np.array_equal(of.shares, plain.shares)
    groups = []
    for number in (0, 1):
        shown = np.concatenate(one_pass(of, number))
        assert np.array_equal(np.sort(shown), np.sort(np.concatenate(one_pass(plain, number)))), "the same images"
        shards = SHARDED[shown]
        begins, ends = np.unique(shards, return_index=True)[1], 999 - np.unique(shards[::-1], return_index=True)[1]
        held = [int(((begins <= place) & (place <= ends)).sum()) for place in range(1000)]
        assert max(held) <= WINDOW
        groups.append(frozenset(shards[:200].tolist()))
        assert len(set(shards[:50].tolist())) > WINDOW / 2, "shuffled within"
    assert groups[0] != groups[1], "drawn anew for every pass"


def test_of_few_shards_a_pass_is_shuffled_as_a_whole() -> None:
    shards = (np.arange(1000) * WINDOW // 1000).astype(np.int32)
    for number in (0, 1):
        parts = one_pass(sampler(SKEWED, shards), number), one_pass(sampler(SKEWED), number)
        assert np.array_equal(np.concatenate(parts[0]), np.concatenate(parts[1]))
