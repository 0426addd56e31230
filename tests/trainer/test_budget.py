import pytest
from medloop_trainer.budget import Pace, measure, most_steps
from medloop_trainer.device import Device
from medloop_trainer.images import Images

from .tiny import equal, tiny_network, tiny_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("minutes", "pace", "per_epoch", "steps"),
    [
        (1.0, Pace(0.1, 1.0, 7.0), 40, 400),  # 50 s hold ten epochs of 5 s
        (1.0, Pace(0.1, 1.0, 8.0), 40, 360),
        (1.0, Pace(1.0, 10.0, 7.0), 1000, 40),  # 50 s, less one look of 10 s
        (0.01, Pace(1.0, 10.0, 7.0), 1000, 1),  # a step is the least
        (1.0, Pace(1.0, 10.0, 7.0), 45, 40),
    ],
)
def test_a_budget_is_a_number_of_steps(minutes: float, pace: Pace, per_epoch: int, steps: int) -> None:
    assert most_steps(minutes, pace, per_epoch) == steps


def test_measuring_leaves_the_network_as_it_was(images: Images, device: Device) -> None:
    network = tiny_network()
    pace = measure(network, images, tiny_recipe(), device, compiled=False)
    assert equal(network, tiny_network())
    assert network.training
    assert min(pace.step, pace.validation) > 0
    assert pace.spent >= 4 * pace.step
