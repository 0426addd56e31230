import torch
from medloop_trainer.randomness import generator, mixed, seed_step


def test_places_have_nothing_in_common() -> None:
    numbers = {mixed(seed, stream, place) for seed in range(3) for stream in ("step", "order") for place in range(50)}
    assert len(numbers) == 300
    assert len({mixed(1, "step", 12), mixed(1, "step", 1, 2), mixed(11, "step", 2)}) == 3
    assert all(0 <= number < 2**64 for number in numbers)


def test_a_step_draws_the_same_whatever_was_drawn_before() -> None:
    seed_step(5, 3)
    first = torch.rand(4)
    seed_step(5, 4)
    assert not torch.equal(torch.rand(4), first)
    seed_step(5, 3, rank=1)
    assert not torch.equal(torch.rand(4), first)
    seed_step(5, 3)
    assert torch.equal(torch.rand(4), first)


def test_a_generator_of_its_own_leaves_the_global_one_alone() -> None:
    seed_step(0, 0)
    expected = torch.rand(2)
    seed_step(0, 0)
    torch.rand(3, generator=generator(0, "order", 1))
    assert torch.equal(torch.rand(2), expected)
