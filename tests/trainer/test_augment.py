import torch
from medloop_trainer.augment import Augmentation
from medloop_trainer.recipe import Options, Recipe
from torch import Tensor

CLASSES = 6


def augmentation(**options: object) -> Augmentation:
    chosen = Options.checked(**options)
    return Augmentation(
        Recipe.settle(chosen, architecture="small-resnet", size=32, images=100, pretrained=None), CLASSES
    )


def flat_images() -> tuple[Tensor, Tensor]:
    """One image of one grey value for each class: moving keeps it flat, since edges are mirrored."""
    labels = torch.arange(CLASSES)
    return (50 + labels * 30).to(torch.uint8)[:, None, None, None].expand(-1, 1, 32, 32), labels


def test_a_mixed_label_is_the_exact_share_of_pixels() -> None:
    images, labels = flat_images()
    augment = augmentation(cutmix_probability=1.0)
    shares = []
    for seed in range(20):
        torch.manual_seed(seed)
        whole, _ = augment(images, labels, mix=False)
        torch.manual_seed(seed)  # the same moves again, then mixed
        mixed, targets = augment(images, labels, mix=True)
        own = (mixed - whole).abs().lt(0.01).float().mean(dim=(1, 2, 3))
        torch.testing.assert_close(targets[labels, labels], own, atol=1e-6, rtol=0)
        torch.testing.assert_close(targets[labels, labels.roll(1)], 1 - own, atol=1e-6, rtol=0)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(CLASSES))
        shares.append(float(own[0]))
    assert max(shares) - min(shares) > 0.3, "how much is mixed must vary"


def test_without_mixing_labels_stay_hard() -> None:
    images, labels = flat_images()
    _, targets = augmentation(cutmix_probability=1.0)(images, labels, mix=False)
    assert torch.equal(targets, torch.eye(CLASSES))


def test_mixing_happens_as_often_as_asked() -> None:
    torch.manual_seed(0)
    images, labels = flat_images()
    augment = augmentation(cutmix_probability=0.25)
    mixed = sum(bool((augment(images, labels, mix=True)[1].max(dim=1).values < 1).any()) for _ in range(200))
    assert 25 <= mixed <= 75


def test_moves_are_small_and_differ_from_image_to_image() -> None:
    torch.manual_seed(0)
    images = torch.zeros(32, 1, 64, 64, dtype=torch.uint8)
    images[:, :, 28:36, 40:48] = 255
    pixels, _ = augmentation()(images, torch.zeros(32, dtype=torch.long), mix=False)
    assert pixels.shape == (32, 1, 64, 64)
    assert pixels.min() >= -0.01
    assert pixels.max() <= 255.01
    bright = (pixels[:, 0] > 128).float()
    across = (bright * torch.arange(64.0)).sum(dim=(1, 2)) / bright.sum(dim=(1, 2))  # px, the square's centre
    assert across.std() > 1
    # 0.08 of the side, a turn of 10° and a zoom of 0.1 about the centre add up to less than 9 px.
    assert (across - 43.5).abs().max() < 9


def test_images_are_mirrored_only_where_that_is_allowed() -> None:
    images = torch.zeros(64, 1, 32, 32, dtype=torch.uint8)
    images[..., :8] = 255  # bright on the left
    labels = torch.zeros(64, dtype=torch.long)

    def share_mirrored(**options: object) -> float:
        torch.manual_seed(0)
        pixels, _ = augmentation(**options)(images, labels, mix=False)
        return float((pixels[..., 16:].mean(dim=(1, 2, 3)) > pixels[..., :16].mean(dim=(1, 2, 3))).float().mean())

    assert share_mirrored() == 0
    assert 0.25 < share_mirrored(horizontal_flip=True) < 0.75


def test_the_same_seed_gives_the_same_batch() -> None:
    images, labels = flat_images()
    batches = []
    for _ in range(2):
        torch.manual_seed(3)
        batches.append(augmentation()(images, labels, mix=True)[0])
    assert torch.equal(*batches)
