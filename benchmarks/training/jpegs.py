"""12,000 drawn JPEG files in class folders, as anybody's loader reads them, and the data set version made of them."""

import io
from pathlib import Path

import numpy as np
from medloop.data.manifest import Manifest
from medloop.data.sources import open_source
from medloop.vision.phantoms import CLASSES, phantom
from numpy.typing import NDArray

from benchmarks.training.bench import Bench, say

IMAGES = 12_000
SIZE = 64  # px
NAME = "jpegs"
_SEED = 11


def folder(bench: Bench) -> Path:
    """`<class>/<number>.jpg`, grey, 64 px; drawn unless they were before."""
    place = bench.folder / f"{NAME}-{IMAGES}"
    if not place.exists():
        say(f"drawing {IMAGES} images …")
        incoming = place.with_name(f".{place.name}")
        for index in range(IMAGES):
            label = CLASSES[index % len(CLASSES)]
            (incoming / label).mkdir(parents=True, exist_ok=True)
            (incoming / label / f"{index:05d}.jpg").write_bytes(jpeg(phantom(label, index, _SEED, SIZE)))
        incoming.rename(place)
    return place


def version(bench: Bench) -> Manifest:
    """The files as a data set version."""
    return bench.dataset(NAME, f"{IMAGES} of seed {_SEED}", lambda: open_source(str(folder(bench))))


def jpeg(image: NDArray[np.uint8]) -> bytes:
    """`image` uint8 [S, S, 1] as a file."""
    from PIL import Image  # the library has no JPEG encoder

    file = io.BytesIO()
    Image.fromarray(image.squeeze(-1)).save(file, "JPEG", quality=90)
    return file.getvalue()
