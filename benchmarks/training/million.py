"""A data set version of any number of images that are not there: a manifest, and a decoded cache that is one hole.

    python -m benchmarks.training.million OBJECTS_URL CACHE_FOLDER IMAGES

Prints the version's id. The rows are as different as a million real ones; all lie at one object's key, and the cache's
file is sparse, so that reading it costs what reading zeros costs, and no disk.
"""

import hashlib
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from medloop.data.cache import FORMAT_VERSION
from medloop.data.manifest import Manifest, Row, Split
from medloop.storage.objects import ObjectStore, open_objects
from medloop.vision.encode import encode_png
from medloop.vision.prepare import PreparationSpec

SIZE = 28  # px
NAME = "million"
_CLASSES = ("a", "b", "c", "d", "e", "f")
_JUDGED = 1000  # images each of val, calibration and test
_KEY = "images/million.png"
_BLOCK = 2**20  # bytes that one checksum of a cache covers


def build(objects: ObjectStore, cache_folder: Path, images: int) -> Manifest:
    """Store the version, and its cache as the trainer would make it."""
    objects.put(_KEY, encode_png(np.zeros((SIZE, SIZE, 1), np.uint8)))
    manifest = Manifest(NAME, _CLASSES, tuple(_rows(images)))
    manifest.save(objects)
    _make_cache(manifest, PreparationSpec(mode="L", size=SIZE), cache_folder)
    return manifest


def _rows(images: int) -> Iterator[Row]:
    judged = min(_JUDGED, images // 10)
    given: dict[int, Split] = {0: "val", 1: "calibration", 2: "test"}
    for index in range(images):
        name = hashlib.sha256(str(index).encode()).hexdigest()
        label = _CLASSES[index % len(_CLASSES)]
        yield Row(name, name[::-1], label, given.get(index // judged, "train"), source="generated", location=_KEY)


def _make_cache(manifest: Manifest, spec: PreparationSpec, folder: Path) -> None:
    place = folder / f"{manifest.id[:16]}-{spec.digest()[:16]}"
    place.mkdir(parents=True, exist_ok=True)
    shape = [len(manifest.rows), spec.size, spec.size, spec.channels]
    blocks, rest = divmod(int(np.prod(shape)), _BLOCK)
    with (place / "images.u8").open("wb") as file:
        file.truncate(blocks * _BLOCK + rest)
    sums = [zlib.crc32(bytes(_BLOCK))] * blocks + ([zlib.crc32(bytes(rest))] if rest else [])
    meta = {"format": FORMAT_VERSION, "dataset_id": manifest.id, "spec": spec.digest(), "shape": shape, "crc32": sums}
    (place / "meta.json").write_text(json.dumps(meta))


def main() -> None:
    url, folder, images = sys.argv[1:]
    print(build(open_objects(url), Path(folder), int(images)).id)


if __name__ == "__main__":
    main()
