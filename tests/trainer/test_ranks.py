"""Two processes that train together, without the trainer around them."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from medloop.errors import InvalidRequest, Preempted, TrainingFailed, Unavailable
from medloop.nets import ServedNetwork
from medloop_trainer.budget import measure
from medloop_trainer.device import Device
from medloop_trainer.learner import plain_copy
from medloop_trainer.loop import fit
from medloop_trainer.modality import Moves
from medloop_trainer.ranks import ALONE, Ranks
from medloop_trainer.recipe import Recipe
from medloop_trainer.stop import Stop
from safetensors.torch import load_file, save_file
from torch import nn

from .tiny import tiny_images, tiny_network, tiny_recipe

DEVICE = Device("cpu", torch.float32, 1)
UNEVEN = 13  # images a batch; of 40, that is 14, 13 and 13


def still() -> Recipe:
    """Nothing is drawn by rank."""
    recipe = tiny_recipe(batch_size=UNEVEN, cutmix_probability=0, ema_decay=0.5)
    return recipe.model_copy(update={"moves": Moves()})


def plain_network(seed: int = 0) -> ServedNetwork:
    """Without norms and dropout, to which it matters who else is in the batch, or in which process."""
    network = tiny_network(seed)
    trunk = network.classifier.trunk
    trunk[1] = trunk[3] = nn.Identity()  # type: ignore[operator]
    return network


@dataclass
class Together:
    """What two processes came to, each on its own."""

    plain: ServedNetwork
    restless: ServedNetwork
    lost: list[str] = field(default_factory=list)


def train_together(ranks: Ranks) -> Together:
    """What each process does; in the end the other one is gone."""
    images, recipe = tiny_images(), tiny_recipe()
    # The leader's weights count.
    plain, restless = plain_network(seed=ranks.rank), tiny_network(seed=ranks.rank)
    fit(plain, images, still(), DEVICE, ranks=ranks)
    mixed = tiny_recipe(batch_size=UNEVEN, cutmix_probability=1, whole_share=0.5)
    fit(restless, images, mixed, DEVICE, ranks=ranks)
    assert measure(restless, images, mixed, DEVICE, compiled=False, ranks=ranks).step > 0

    stop, calls = Stop(), iter(range(100))

    def told_in_the_third_step(*_: object) -> None:
        stop.requested |= next(calls) == 2 and ranks.rank == 1

    with pytest.raises(Preempted, match="after step 3 of"):
        fit(tiny_network(), images, recipe, DEVICE, ranks=ranks, stop=stop, progress=told_in_the_third_step)

    network, spoiled = tiny_network(), torch.inf if ranks.rank == 1 else 1.0
    network.classifier.head.weight.register_hook(lambda gradient: gradient * spoiled)  # type: ignore[no-untyped-call]
    with pytest.raises(TrainingFailed, match="lowered"):
        fit(network, images, recipe, DEVICE, ranks=ranks)
    return Together(plain, restless)


@contextmanager
def joined(rank: int, store: Path) -> Iterator[Ranks]:
    torch.distributed.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield Ranks.present()
    finally:
        torch.set_num_threads(threads)
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def together(folder: Path) -> Iterator[Together]:
    """This process leads another one."""
    store = folder / "store"
    code = f"from pathlib import Path; from tests.trainer.test_ranks import follow; follow(Path({str(folder)!r}))"
    command, root = [sys.executable, "-c", code], Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True) as other:
        with joined(0, store) as ranks:
            found = train_together(ranks)
            assert other.wait(60) == 0, other.stderr and other.stderr.read()
            with pytest.raises(Unavailable) as lost:
                fit(tiny_network(), tiny_images(), tiny_recipe(), DEVICE, ranks=ranks)
            found.lost.append(lost.value.detail)
        yield found


def test_two_ranks_come_to_the_weights_of_one_process(together: Together) -> None:
    network = plain_network()
    fit(network, tiny_images(), still(), DEVICE)
    common, alone, untrained = together.plain.state_dict(), network.state_dict(), plain_network().state_dict()
    for name, value in alone.items():
        torch.testing.assert_close(common[name], value, atol=1e-5, rtol=0)
    weights = "classifier.head.weight"
    assert (alone[weights] - untrained[weights]).abs().max() > 1e-3, "something was learnt"


@pytest.mark.parametrize("name", ["plain", "restless"])
def test_all_ranks_end_with_the_same_bits(name: str, together: Together, folder: Path) -> None:
    one, other = getattr(together, name).state_dict(), load_file(folder / name)
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_a_lost_rank_is_told(together: Together) -> None:
    [told] = together.lost
    assert "Another process of this training is gone" in told


def test_there_can_be_too_many_processes() -> None:
    ALONE.check(1)
    Ranks(0, 2).check(4)
    with pytest.raises(InvalidRequest, match="2 processes are too many for batches of 3 images"):
        Ranks(0, 2).check(3)


def follow(place: Path) -> None:
    """The other process."""
    with joined(1, place / "store") as here:
        mine = train_together(here)
    for name in ("plain", "restless"):
        tensors = getattr(mine, name).state_dict()
        save_file({key: plain_copy(value) for key, value in tensors.items()}, place / name)
