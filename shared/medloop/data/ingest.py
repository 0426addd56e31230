"""One image into a data set: decode it, free it of metadata, hash it, store it."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medloop.data.manifest import Scalar, Split
from medloop.data.parallel import ProgressFn, batched, ordered_map, workers_for
from medloop.data.phash import hash_plane, perceptual_hashes
from medloop.data.sources.source import UNREADABLE, RawImage, Source
from medloop.errors import InvalidImage, Issue
from medloop.storage.objects import ObjectStore
from medloop.vision.decode import Pixels, decode, pixel_hash
from medloop.vision.encode import strip_metadata

_BATCH = 64  # images a thread takes at once
_CHANNELS = {1: "grey", 2: "grey with alpha", 3: "RGB", 4: "RGB with alpha"}


@dataclass(frozen=True, slots=True)
class StoredImage:
    """What becomes a row, less its final split. `phashes` are those of its eight forms, `name` is for messages."""

    byte_hash: str
    pixel_hash: str
    phashes: tuple[int, ...]
    location: str
    mode: str
    label: str
    given: Split | None
    group: str
    metadata: Mapping[str, Scalar]
    name: str


def image_key(byte_hash: str) -> str:
    """Where an image lies in objects."""
    return f"images/{byte_hash[:2]}/{byte_hash}"


def ingest(source: Source, objects: ObjectStore, progress: ProgressFn | None = None) -> Iterator[StoredImage | Issue]:
    """Store each image of the source, in order; what cannot be read comes as an issue in its place.

    Nothing here waits for the disk: the manifest that names the images is written durably afterwards.
    """
    done = 0
    batches = batched(source.read(), _BATCH)
    for batch in ordered_map(lambda items: _store(items, objects), batches, workers=workers_for(objects)):
        yield from batch
        done += len(batch)
        if progress:
            progress("reading images", done, source.count)


def _store(items: Sequence[RawImage | Issue], objects: ObjectStore) -> list[StoredImage | Issue]:
    decoded = [_decoded(item) for item in items]
    planes = [hash_plane(pixels) for pixels in decoded if not isinstance(pixels, Issue)]
    phashes = iter(perceptual_hashes(np.stack(planes)).tolist() if planes else ())
    stored: list[StoredImage | Issue] = []
    for item, pixels in zip(items, decoded, strict=True):
        if isinstance(pixels, Issue):
            stored.append(pixels)
        elif isinstance(item, RawImage):
            stored.append(_put(item, pixels, tuple(next(phashes)), objects))
    return stored


def _decoded(item: RawImage | Issue) -> Pixels | Issue:
    if isinstance(item, Issue):
        return item
    try:
        return decode(item.data).pixels
    except InvalidImage as exc:
        return Issue(UNREADABLE, item.name, exc.detail)


def _put(item: RawImage, pixels: Pixels, phashes: tuple[int, ...], objects: ObjectStore) -> StoredImage:
    plain = strip_metadata(item.data)
    byte_hash = hashlib.sha256(plain).hexdigest()
    location = image_key(byte_hash)
    objects.put_if_absent(location, plain, durable=False)
    return StoredImage(
        byte_hash=byte_hash,
        pixel_hash=pixel_hash(pixels),
        phashes=phashes,
        location=location,
        mode=f"{_CHANNELS[pixels.shape[2]]}, {8 * pixels.itemsize} bits",
        label=item.label,
        given=item.split,
        group=item.group,
        metadata=item.metadata,
        name=item.name,
    )
