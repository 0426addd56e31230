"""The peer of our input: torchvision's ImageFolder, transforms v2 and torch's DataLoader."""

from pathlib import Path

from medloop_trainer.modality import Moves


class Peer:
    """Grey images of a folder, changed by `moves` as ours are, in batches of `size`: float32
    [size, 1, S, S] and labels.

    Each is given what serves it best: grey pixels instead of ImageFolder's three equal channels, changes of the Pillow
    image instead of the tensor (which is the faster of the two at this size), and workers that stay.
    """

    def __init__(self, folder: Path, moves: Moves, workers: int, size: int) -> None:
        import torch
        from torch.utils.data import DataLoader
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import InterpolationMode, v2

        changes = v2.Compose(
            [
                v2.RandomAffine(
                    degrees=moves.turn,
                    translate=(moves.shift, moves.shift),
                    scale=(1 - moves.zoom, 1 + moves.zoom),
                    interpolation=InterpolationMode.BILINEAR,
                ),
                v2.RandomHorizontalFlip(0.5 if moves.horizontal_flip else 0.0),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32),
            ]
        )
        self.loader: DataLoader[object] = DataLoader(
            ImageFolder(str(folder), changes, loader=_grey),
            batch_size=size,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
        )

    def epoch(self) -> int:
        """Read every image once; how many there were."""
        count = 0
        for pixels, _ in self.loader:
            count += len(pixels)
        return count


def _grey(path: str) -> object:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("L")
