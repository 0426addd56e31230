import json
from pathlib import Path

import numpy as np
import pytest
from medloop.errors import InvalidRequest
from medloop_trainer.modality import Looks
from medloop_trainer.recipe import Options, ParentVersion, Preset, Recipe, choose_epochs


def settled(
    images: int = 1000,
    pretrained: str | None = None,
    looks: Looks = Looks(),  # noqa: B008  a tuple of numbers
    most_steps: int | None = None,
    parent: ParentVersion | None = None,
    **options: object,
) -> Recipe:
    chosen = Options.checked(**options)
    return Recipe.settle(
        chosen,
        architecture="small-resnet",
        size=64,
        images=images,
        pretrained=pretrained,
        parent=parent,
        looks=looks,
        most_steps=most_steps,
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("batch_size", 1),
        ("learning_rate", 0),
        ("epochs", 0),
        ("cutmix_probability", 1.5),
        ("size", 4),
        ("seed", -1),
        ("patience", -1),
    ],
)
def test_an_option_out_of_range_is_named(option: str, value: float) -> None:
    with pytest.raises(InvalidRequest, match=f"^--{option.replace('_', '-')} {value} cannot be used"):
        Options.checked(**{option: value})


def test_what_was_asked_for_is_kept() -> None:
    recipe = settled(epochs=3, learning_rate=0.01, batch_size=8, seed=5)
    assert (recipe.epochs, recipe.learning_rate, recipe.batch_size, recipe.seed) == (3, 0.01, 8, 5)


def test_pretrained_weights_are_trained_gently() -> None:
    assert settled(pretrained="file:x.pth").learning_rate < settled().learning_rate / 5


def test_a_champion_is_retrained_for_a_shorter_time_and_more_gently_and_sees_corrections_more_often() -> None:
    champion = ParentVersion(model="phantoms", version="3", run_id="a" * 32, bundle_digest="b" * 64)
    new, again = settled(), settled(parent=champion)
    assert again.epochs == -(-new.epochs // 3)
    assert again.learning_rate < new.learning_rate / 5
    assert (new.correction_weight, again.correction_weight) == (1, 4)
    assert Recipe.read(again.model_dump_json()).parent == champion
    asked = settled(parent=champion, epochs=50, learning_rate=0.01, correction_weight=2)
    assert (asked.epochs, asked.learning_rate, asked.correction_weight) == (50, 0.01, 2)


def test_a_recipe_from_before_retraining_is_still_read() -> None:
    document = settled().model_dump(mode="json", exclude={"parent", "correction_weight"})
    assert Recipe.read(json.dumps(document)) == settled()


@pytest.mark.parametrize(("preset", "most", "least"), [("quick", 60, 5), ("standard", 120, 10), ("best", 300, 20)])
def test_more_images_need_fewer_epochs_and_more_steps(preset: Preset, most: int, least: int) -> None:
    sizes = [10, 100, 546, 1680, 8401, 100_000, 10_000_000]
    epochs = [choose_epochs(n, preset) for n in sizes]
    assert epochs == sorted(epochs, reverse=True)
    assert (epochs[0], epochs[-1]) == (most, least)
    seen = [n * e for n, e in zip(sizes, epochs, strict=True)]
    assert seen == sorted(seen)


def test_a_preset_changes_nothing_but_how_long_is_trained() -> None:
    quick, best = (settled(preset=preset).model_dump() for preset in ("quick", "best"))
    assert {name for name in quick if quick[name] != best[name]} == {"epochs", "ema_decay", "patience"}


@pytest.mark.parametrize(
    ("most_steps", "epochs", "steps_per_epoch"),
    [(None, 10, 15), (1000, 10, 15), (150, 10, 15), (149, 9, 15), (15, 1, 15), (14, 1, 14), (0, 1, 1)],
)
def test_a_budget_takes_epochs_away_and_never_adds_any(most_steps: int, epochs: int, steps_per_epoch: int) -> None:
    recipe = settled(epochs=10, most_steps=most_steps)
    assert (recipe.epochs, recipe.steps_per_epoch, recipe.steps) == (epochs, steps_per_epoch, epochs * steps_per_epoch)


def test_what_follows_from_the_number_of_steps_follows_the_budget() -> None:
    assert settled(epochs=40, most_steps=150) == settled(epochs=10)


def test_the_average_of_weights_forgets_the_first_half() -> None:
    for images in (50, 1000, 100_000):
        recipe = settled(images=images)
        assert recipe.ema_decay ** (recipe.steps / 2) < 0.01
    recipe = settled(ema_decay=0.999)
    decays = [recipe.ema_decay_at(step) for step in (0, 10, 100, 100_000)]
    assert decays == sorted(decays)
    assert (decays[0], decays[-1]) == (0.1, 0.999)
    assert settled(ema_decay=0).ema_decay_at(1000) == 0


def test_classes_are_shown_between_their_own_and_equal_shares() -> None:
    counts = [900, 100, 0]
    shares = {way: settled(sampling=way).shown_shares(counts).tolist() for way in ("natural", "sqrt", "balanced")}
    assert shares == {"natural": [0.9, 0.1, 0.0], "sqrt": [0.75, 0.25, 0.0], "balanced": [0.5, 0.5, 0.0]}
    for way in shares:
        np.testing.assert_allclose(settled(sampling=way).shown_shares([70, 70]), 0.5)


def test_a_batch_is_mixed_in_one_way() -> None:
    with pytest.raises(InvalidRequest, match="add up to more than 1"):
        Options.checked(cutmix_probability=0.6, mixup_probability=0.5)


def test_what_may_be_done_to_images_follows_their_looks_unless_asked_otherwise() -> None:
    assert settled(looks=Looks(3)).moves.right_angles
    assert not settled(looks=Looks(3), modality="ct-mr").moves.right_angles
    assert not settled().moves.horizontal_flip
    assert settled(horizontal_flip=True).moves.horizontal_flip


def test_a_recipe_reads_as_it_was_written() -> None:
    recipe = settled(modality="histology", horizontal_flip=False, erase_probability=0.25, logit_adjustment=1.0)
    assert Recipe.read(recipe.model_dump_json(indent=1)) == recipe
    assert recipe.moves.vertical_flip
    assert not recipe.moves.horizontal_flip
    assert recipe.moves.erase_probability == 0.25


@pytest.mark.parametrize("change", [{"schema_version": 1}, {"newer": 3}])
def test_a_recipe_of_another_trainer_is_not_guessed_at(change: dict[str, int]) -> None:
    with pytest.raises(InvalidRequest, match="another version of the trainer"):
        Recipe.read(json.dumps({**settled().model_dump(), **change}))


@pytest.mark.parametrize(("epochs", "mixed"), [(1, 0), (2, 1), (10, 8), (20, 17)])
def test_the_last_epochs_see_whole_images(epochs: int, mixed: int) -> None:
    assert settled(epochs=epochs).cutmix_epochs() == mixed
    assert settled(epochs=epochs, whole_share=0).cutmix_epochs() == epochs


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
