"""Figures are drawn for every number and every name of classes."""

from collections.abc import Callable

import numpy as np
import pytest
from medloop.vision.decode import decode
from medloop_evaluator.metrics import Scorer
from medloop_evaluator.plots import confusion_png, reliability_png, roc_png


@pytest.mark.parametrize("draw", [confusion_png, reliability_png, roc_png])
@pytest.mark.parametrize("classes", [["a", "b"], ["$x", r"$\frac$", "c"], [f"class {k}" for k in range(25)]])
def test_a_figure_has_ink_and_is_the_same_each_time(draw: Callable[[Scorer], bytes], classes: list[str]) -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(len(classes)), 60)
    scorer = Scorer(probabilities, rng.integers(len(classes), size=60), classes)
    data = draw(scorer)
    assert decode(data).pixels.std() > 10
    assert draw(scorer) == data
