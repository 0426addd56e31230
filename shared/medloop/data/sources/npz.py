"""MedMNIST's layout (Yang et al. 2023, https://medmnist.com): arrays `<split>_images` and `<split>_labels` in an .npz.

Images are uint8 [N, H, W] or [N, H, W, 3], labels integers [N, 1] or [N]. Class names are not inside: they are read
from `<name>.classes.txt` beside the file where that exists (one a line, with or without its number in front), and are
the numbers themselves otherwise.
"""

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medloop.data.manifest import SPLITS, Split
from medloop.data.sources.source import RawImage, Source, slug
from medloop.errors import InvalidDataset, Issue
from medloop.vision.encode import encode_png_canonical

_MOST_CLASSES = 1000  # more without a list of names is a column of something else
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class _Part:
    split: Split
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def npz_source(path: Path) -> Source:
    """A MedMNIST file. Raises `InvalidDataset` when it is not one; labels out of range are issues of the source."""
    arrays = _read_arrays(path)
    parts = [
        _part(path, arrays, split) for split in SPLITS if f"{split}_images" in arrays or f"{split}_labels" in arrays
    ]
    if not any(part.split == "train" for part in parts):
        raise InvalidDataset(
            f"{path.name} holds no train_images and train_labels, as MedMNIST files do; check the file."
        )
    classes = _class_names(path) or _numbers(path, parts)
    issues = [issue for part in parts for issue in _out_of_range(part, len(classes))]
    count = sum(len(part.labels) for part in parts)
    return Source(classes, slug(path.stem), "medmnist", count, lambda: _images(parts, classes), tuple(issues))


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    if path.stat().st_size == 0:
        raise InvalidDataset(f"{path.name} is empty (0 bytes); download it again.")
    wanted = [f"{split}_{what}" for split in SPLITS for what in ("images", "labels")]
    try:
        # Opened here: numpy leaves a file open that turns out to be damaged.
        with path.open("rb") as file:
            # Never pickles: a file of somebody else's must not run code here.
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, Mapping):
                raise InvalidDataset(f"{path.name} holds a single array; save several by name, as MedMNIST does.")
            return {key: np.asarray(archive[key]) for key in wanted if key in archive}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error, KeyError) as exc:
        raise InvalidDataset(f"{path.name} is no readable .npz of plain arrays ({exc}); download it again.") from exc


def _part(path: Path, arrays: Mapping[str, NDArray[Any]], split: Split) -> _Part:
    for key in (f"{split}_images", f"{split}_labels"):
        if key not in arrays:
            raise InvalidDataset(f"{path.name} has no {key}, which belongs to its other half; check the file.")
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    flat = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3))
    if images.dtype != np.uint8 or not flat or 0 in images.shape[1:]:
        raise InvalidDataset(
            f"{split}_images in {path.name} is {images.dtype} {list(images.shape)}; needed is uint8 [N, H, W] or "
            "[N, H, W, 3], that is two-dimensional images."
        )
    if labels.ndim not in (1, 2) or labels.shape[1:] not in ((), (1,)) or not np.issubdtype(labels.dtype, np.integer):
        raise InvalidDataset(
            f"{split}_labels in {path.name} is {labels.dtype} {list(labels.shape)}; needed are integers [N] or [N, 1], "
            "that is one label an image."
        )
    if len(images) != len(labels):
        raise InvalidDataset(f"{path.name} has {len(images)} {split}_images but {len(labels)} {split}_labels.")
    return _Part(split, images, labels.reshape(-1).astype(np.int64))


def _class_names(path: Path) -> tuple[str, ...] | None:
    names = path.with_name(f"{path.stem}.classes.txt")
    if not names.is_file():
        return None
    try:
        lines = [line.strip() for line in names.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidDataset(f"{names.name} cannot be read as UTF-8 text; save it again.") from exc
    words = [line.split(maxsplit=1) for line in lines]
    if all(len(pair) == 2 and pair[0].rstrip(":.") == str(number) for number, pair in enumerate(words)):
        lines = [pair[1] for pair in words]
    if len(set(lines)) != len(lines):
        raise InvalidDataset(f"{names.name} names a class twice; give every class its own name.")
    return tuple(lines)


def _numbers(path: Path, parts: list[_Part]) -> tuple[str, ...]:
    most = max((int(part.labels.max()) for part in parts if len(part.labels)), default=-1)
    if most >= _MOST_CLASSES:
        raise InvalidDataset(f"A label in {path.name} is {most}; name the classes in {path.stem}.classes.txt.")
    return tuple(str(number) for number in range(most + 1))


def _out_of_range(part: _Part, classes: int) -> Iterator[Issue]:
    wrong = np.flatnonzero((part.labels < 0) | (part.labels >= classes))
    for index in wrong[:_SHOWN].tolist():
        where = f"{part.split}_labels[{index}]"
        yield Issue(
            "label-out-of-range", where, f"is {part.labels[index]}; the {classes} classes are 0 to {classes - 1}"
        )
    if len(wrong) > _SHOWN:
        yield Issue("label-out-of-range", f"{part.split}_labels", f"and {len(wrong) - _SHOWN} more like these")


def _images(parts: list[_Part], classes: tuple[str, ...]) -> Iterator[RawImage | Issue]:
    for part in parts:
        for index, (image, label) in enumerate(zip(part.images, part.labels.tolist(), strict=True)):
            if 0 <= label < len(classes):
                name = f"{part.split}_images[{index}]"
                yield RawImage(encode_png_canonical(image), classes[label], part.split, "", name)
