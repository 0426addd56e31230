from pathlib import Path

import pytest
from medloop.errors import InvalidRequest
from medloop_trainer.recipe import Options, Recipe, choose_epochs


def settled(images: int = 1000, pretrained: str | None = None, **options: object) -> Recipe:
    chosen = Options.checked(**options)
    return Recipe.settle(chosen, architecture="small-resnet", size=64, images=images, pretrained=pretrained)


@pytest.mark.parametrize(
    ("option", "value"),
    [("batch_size", 1), ("learning_rate", 0), ("epochs", 0), ("cutmix_probability", 1.5), ("size", 4), ("seed", -1)],
)
def test_an_option_out_of_range_is_named(option: str, value: float) -> None:
    with pytest.raises(InvalidRequest, match=f"^--{option.replace('_', '-')} {value} cannot be used"):
        Options.checked(**{option: value})


def test_what_was_asked_for_is_kept() -> None:
    recipe = settled(epochs=3, learning_rate=0.01, batch_size=8, seed=5)
    assert (recipe.epochs, recipe.learning_rate, recipe.batch_size, recipe.seed) == (3, 0.01, 8, 5)


def test_pretrained_weights_are_trained_gently() -> None:
    assert settled(pretrained="file:x.pth").learning_rate < settled().learning_rate / 5


def test_more_images_need_fewer_epochs_and_more_steps() -> None:
    sizes = [10, 100, 546, 1680, 8401, 100_000, 1_000_000]
    epochs = [choose_epochs(n) for n in sizes]
    assert epochs == sorted(epochs, reverse=True)
    assert (epochs[0], epochs[-1]) == (60, 5)
    seen = [n * e for n, e in zip(sizes, epochs, strict=True)]
    assert seen == sorted(seen)


@pytest.mark.parametrize(("epochs", "mixed"), [(1, 0), (2, 1), (10, 8), (20, 17)])
def test_the_last_epochs_see_whole_images(epochs: int, mixed: int) -> None:
    assert settled(epochs=epochs).cutmix_epochs() == mixed


@pytest.mark.parametrize(("side", "size"), [(16, 28), (28, 28), (50, 50), (64, 64), (224, 64)])
def test_images_are_prepared_at_their_own_size_up_to_64_px(side: int, size: int) -> None:
    assert Options().choose_size(side) == size
    assert Options(size=224).choose_size(side) == 224


def test_small_images_get_the_small_network() -> None:
    assert Options().choose_architecture(64) == "small-resnet"
    assert Options().choose_architecture(224) == "resnet18"
    assert Options(architecture="vgg16").choose_architecture(64) == "vgg16"


def test_weights_are_none_automatic_or_a_file() -> None:
    assert Options(pretrained="none").weights is None
    assert Options().weights == "auto"
    assert Options(pretrained="some/file.pth").weights == Path("some/file.pth")
