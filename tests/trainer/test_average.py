import torch
from medloop_trainer.average import Average

from .tiny import equal, tiny_network, tiny_recipe


def test_weights_and_statistics_are_averaged_and_counters_copied() -> None:
    network, recipe = tiny_network(), tiny_recipe(ema_decay=0.75)
    average = Average(network, recipe)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        for value in network.state_dict().values():
            value.add_(1)
    average.update(step=100)
    for name, value in average.network.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, before[name] + 0.25)
        else:
            assert torch.equal(value, before[name] + 1)


def test_a_young_average_follows_faster() -> None:
    network, recipe = tiny_network(), tiny_recipe(ema_decay=0.99)
    average = Average(network, recipe)
    with torch.no_grad():
        network.classifier.head.bias.fill_(1)
        average.network.classifier.head.bias.fill_(0)
    average.update(step=0)
    torch.testing.assert_close(average.network.classifier.head.bias, torch.full((2,), 0.9))


def test_an_average_of_what_never_changes_is_it() -> None:
    network = tiny_network()
    average = Average(network, tiny_recipe(ema_decay=0.9))
    for step in range(20):
        average.update(step)
    assert equal(average.network, network)
    assert not average.network.training
    assert not any(parameter.requires_grad for parameter in average.network.parameters())
