from typing import Any

import pytest
import torch
from medloop_trainer.augment import Augmentation, change, erase, move
from medloop_trainer.modality import POLICIES, Looks, Moves
from medloop_trainer.recipe import Options, Recipe
from torch import Tensor

CLASSES = 6
EVERYTHING = Moves(
    turn=20,
    zoom=0.2,
    shift=0.1,
    horizontal_flip=True,
    vertical_flip=True,
    right_angles=True,
    brightness=0.3,
    contrast=0.3,
    erase_probability=0.5,
)


def augmentation(moves: Moves | None = None, looks: Looks = Looks(), **options: object) -> Augmentation:  # noqa: B008
    chosen = Options.checked(**options)
    recipe = Recipe.settle(chosen, architecture="small-resnet", size=32, images=100, pretrained=None, looks=looks)
    return Augmentation(recipe.model_copy(update={"moves": moves} if moves else {}), CLASSES)


def flat_images() -> tuple[Tensor, Tensor]:
    """One image of one grey value for each class: moving keeps it flat, since edges are mirrored."""
    labels = torch.arange(CLASSES)
    return (50 + labels * 30).to(torch.uint8)[:, None, None, None].expand(-1, 1, 32, 32), labels


def noise(channels: int = 1, count: int = CLASSES, side: int = 32) -> Tensor:
    """uint8, channels last in memory, as the loop hands them over."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, side, side, channels)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2)


def test_a_mixed_label_is_the_exact_share_of_pixels() -> None:
    images, labels = flat_images()
    augment = augmentation(cutmix_probability=1.0)
    torch.manual_seed(0)
    shares = []
    for _ in range(20):
        mixed, targets = augment(images, labels, mix=True)
        own = (mixed - images).abs().lt(0.01).float().mean(dim=(1, 2, 3))
        torch.testing.assert_close(targets[labels, labels], own, atol=1e-6, rtol=0)
        torch.testing.assert_close(targets[labels, labels.roll(1)], 1 - own, atol=1e-6, rtol=0)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(CLASSES))
        shares.append(own)
    assert torch.stack(shares).std(dim=0).min() > 0.1, "how much is mixed must vary from batch to batch"
    assert torch.stack(shares).std(dim=1).min() > 0.02, "and from image to image"


def test_without_mixing_labels_stay_hard() -> None:
    images, labels = flat_images()
    _, targets = augmentation(cutmix_probability=0.5, mixup_probability=0.5)(images, labels, mix=False)
    assert torch.equal(targets, torch.eye(CLASSES))


@pytest.mark.parametrize("cutmix", [0.0, 0.25, 0.5])
def test_mixing_happens_as_often_and_in_the_way_asked_for(cutmix: float) -> None:
    torch.manual_seed(0)
    images, labels = flat_images()
    images = images[..., :8, :8]
    augment = augmentation(cutmix_probability=cutmix, mixup_probability=0.25)
    values = {float(value) for value in images[:, 0, 0, 0]}
    pasted = blended = 0
    for _ in range(200):
        pixels, targets = augment(images, labels, mix=True)
        if bool((targets.amax(dim=1) < 1).any()):
            found = {round(value) for value in pixels.flatten().tolist()}
            pasted, blended = pasted + (found <= values), blended + (not found <= values)
    # Binomial of 200: four standard deviations are 25 and less.
    assert abs(pasted - 200 * cutmix) <= (25 if cutmix else 0)
    assert abs(blended - 200 * 0.25) <= 25


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("cutmix", "mixup"), [(1.0, 0.0), (0.0, 1.0)])
def test_types_ranges_and_sums_hold_at_full_strength(channels: int, cutmix: float, mixup: float) -> None:
    torch.manual_seed(0)
    images, labels = noise(channels), torch.arange(CLASSES)
    before = images.clone()
    augment = augmentation(EVERYTHING, cutmix_probability=cutmix, mixup_probability=mixup)
    for _ in range(20):
        pixels, targets = augment(images, labels, mix=True)
        assert (pixels.shape, pixels.dtype) == (images.shape, torch.float32)
        assert (targets.shape, targets.dtype) == ((CLASSES, CLASSES), torch.float32)
        assert 0 <= float(pixels.min()) <= float(pixels.max()) <= 255
        assert float(targets.min()) >= 0
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(CLASSES))
    assert torch.equal(images, before), "what the cache holds is not written to"


def test_at_zero_strength_pixels_stay_as_they_are() -> None:
    images = noise(3)
    pixels, _ = augmentation(Moves())(images, torch.arange(CLASSES), mix=False)
    assert torch.equal(pixels, images.float())


def test_moves_are_small_and_differ_from_image_to_image() -> None:
    torch.manual_seed(0)
    images = torch.zeros(32, 1, 64, 64, dtype=torch.uint8)
    images[:, :, 28:36, 40:48] = 255
    pixels, _ = augmentation()(images, torch.zeros(32, dtype=torch.long), mix=False)
    bright = (pixels[:, 0] > 128).float()
    across = (bright * torch.arange(64.0)).sum(dim=(1, 2)) / bright.sum(dim=(1, 2))  # px, the square's centre
    assert across.std() > 1
    # 0.08 of the side, a turn of 10° and a zoom of 0.1 about the centre add up to less than 9 px.
    assert (across - 43.5).abs().max() < 9


def seen(image: Tensor, **moves: Any) -> set[int]:
    """Which of the eight turned and mirrored forms of `image` [S, S] come out of 64 moves, counted by quarter turns,
    the mirrored ones from 4 on; -1 is anything else."""
    torch.manual_seed(0)
    forms = [form.rot90(turn, (0, 1)) for form in (image, image.fliplr()) for turn in range(4)]
    moved = move(image.expand(64, 1, -1, -1), Moves(**moves))[:, 0]
    return {next((k for k, form in enumerate(forms) if torch.allclose(form, one, atol=0.05)), -1) for one in moved}


@pytest.mark.parametrize("side", [28, 33])
def test_images_are_mirrored_and_turned_only_where_that_is_allowed(side: int) -> None:
    image = noise(side=side)[0, 0].float()
    assert seen(image, horizontal_flip=True) == {0, 4}
    assert seen(image, vertical_flip=True) == {0, 6}
    assert seen(image, right_angles=True) == {0, 1, 2, 3}
    assert seen(image, horizontal_flip=True, vertical_flip=True, right_angles=True) == set(range(8))


@pytest.mark.parametrize("modality", ["radiograph", "ct-mr", "auto"])
def test_left_stays_left_in_a_body(modality: str) -> None:
    images = torch.zeros(64, 1, 32, 32, dtype=torch.uint8)
    images[..., :8, :8] = 255  # bright above on the left
    torch.manual_seed(0)
    pixels, _ = augmentation(modality=modality)(images, torch.zeros(64, dtype=torch.long), mix=False)
    assert (pixels[..., :16].mean(dim=(1, 2, 3)) > pixels[..., 16:].mean(dim=(1, 2, 3))).all()
    assert (pixels[..., :16, :].mean(dim=(1, 2, 3)) > pixels[..., 16:, :].mean(dim=(1, 2, 3))).all()


def test_brightness_moves_the_mean_and_contrast_the_spread() -> None:
    torch.manual_seed(0)
    images = noise(count=500).float() / 2 + 64  # so far from the ends that nothing is cut off
    brighter = change(images, Moves(brightness=0.1))
    moved = brighter.mean(dim=(1, 2, 3)) - images.mean(dim=(1, 2, 3))
    assert 24 < float(moved.abs().max()) <= 25.6
    assert abs(float(moved.mean())) < 4 * 25.5 / 3**0.5 / 500**0.5
    torch.testing.assert_close(brighter.std(dim=(1, 2, 3)), images.std(dim=(1, 2, 3)))

    steeper = change(images, Moves(contrast=0.1))
    stretched = steeper.std(dim=(1, 2, 3)) / images.std(dim=(1, 2, 3))
    assert 0.095 < float((stretched - 1).abs().max()) <= 0.1001
    assert abs(float(stretched.mean()) - 1) < 4 * 0.1 / 3**0.5 / 500**0.5
    torch.testing.assert_close(steeper.mean(dim=(1, 2, 3)), images.mean(dim=(1, 2, 3)))


def test_in_ct_no_grey_value_is_made_up() -> None:
    torch.manual_seed(0)
    images, labels = flat_images()
    pixels, _ = augmentation(modality="ct-mr", looks=Looks(1, 0.0, 0.0))(images, labels, mix=False)
    torch.testing.assert_close(pixels, images.float(), atol=0.01, rtol=0)


def test_erasing_leaves_one_flat_rectangle_of_bounded_size() -> None:
    torch.manual_seed(0)
    images = noise(channels=3, count=300).float()
    after = erase(images, 0.5)
    erased = (after != images).all(dim=1)  # [N, S, S]
    touched = erased.flatten(1).any(dim=1)
    assert 110 <= int(touched.sum()) <= 190
    share = erased[touched].float().mean(dim=(1, 2))
    # Smaller than drawn where rounding or the image's edge cuts it off.
    assert 0.12 < float(share.max()) <= 0.2
    flat = images.mean(dim=(2, 3))[:, :, None, None].expand_as(images)
    torch.testing.assert_close(after, torch.where(erased[:, None], flat, images))
    rows, columns = erased.any(dim=2), erased.any(dim=1)
    assert torch.equal(rows.sum(dim=1) * columns.sum(dim=1), erased.sum(dim=(1, 2)))


@pytest.mark.parametrize("modality", list(POLICIES))
def test_the_same_seed_gives_the_same_batch_and_nothing_is_kept(modality: str) -> None:
    images, labels = noise(), torch.arange(CLASSES)
    options: dict[str, Any] = {"modality": modality, "erase_probability": 0.5, "mixup_probability": 0.5}
    used = augmentation(**options)
    used(images, labels, mix=True)
    for seed in range(4):
        torch.manual_seed(seed)
        expected = augmentation(**options)(images, labels, mix=True)
        torch.manual_seed(seed)
        found = used(images, labels, mix=True)
        assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
