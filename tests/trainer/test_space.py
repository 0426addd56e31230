import math
from collections.abc import Mapping
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from medloop_trainer.recipe import Options, Recipe
from medloop_trainer.space import SEARCHED, OneOf, Point, Space, flags, options_at, point_of


def settled(
    images: int = 2000, pretrained: str | None = None, options: Mapping[str, object] = MappingProxyType({})
) -> Recipe:
    chosen = Options.checked(**options)
    return Recipe.settle(chosen, architecture="small-resnet", size=28, images=images, pretrained=pretrained)


SPACE = Space.around(settled(), 2000)
POINTS = st.fixed_dictionaries(
    {
        each.name: st.sampled_from(each.choices) if isinstance(each, OneOf) else st.floats(each.low, each.high)
        for each in SPACE.dimensions
    }
)


@given(point=POINTS)
def test_every_point_can_be_trained_with_and_typed(point: Point) -> None:
    options = options_at(point)
    assert options.keys() <= set(SEARCHED)
    chosen = Options.checked(**options)
    mixed = chosen.cutmix_probability + chosen.mixup_probability
    assert mixed == pytest.approx(float(point["mix_probability"]), abs=0.0006)
    assert (settled(options=options).ema_decay > 0) is point["average"]
    # What is typed is what the trial was trained with, to the bit.
    typed = flags(options)
    assert dict(zip(typed[::2], map(float, typed[1::2]), strict=True)) == {
        "--" + name.replace("_", "-"): float(value) for name, value in options.items()
    }


@pytest.mark.parametrize("pretrained", [None, "imagenet"])
@pytest.mark.parametrize("images", [24, 550, 100_000])
def test_the_recipe_lies_in_the_space_around_it(images: int, pretrained: str | None) -> None:
    recipe = settled(images, pretrained)
    space, point = Space.around(recipe, images), point_of(recipe)
    assert point.keys() == {each.name for each in space.dimensions}
    for each in space.dimensions:
        if isinstance(each, OneOf):
            assert point[each.name] in each.choices
        else:
            assert each.low <= point[each.name] <= each.high
    assert settled(images, pretrained, options_at(point)) == recipe
    assert Space.model_validate_json(space.model_dump_json()) == space


def test_an_epoch_has_steps_enough_to_tell_batch_sizes_apart() -> None:
    [sizes] = [each.choices for each in Space.around(settled(550), 550).dimensions if isinstance(each, OneOf)][:1]
    assert sizes == (16, 32, 64)
    assert all(math.floor(550 / size) >= 8 for size in sizes if not isinstance(size, bool))


def test_flags_are_what_the_command_line_takes() -> None:
    options = {"horizontal_flip": False, "modality": "xray", "batch_size": 32, "learning_rate": 0.00003}
    assert flags(options) == [
        *("--no-horizontal-flip", "--modality", "xray"),
        *("--batch-size", "32", "--learning-rate", "3e-05"),
    ]
