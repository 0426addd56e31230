"""Where prepared images come from: a cache on this machine's disk, or, where that has no room, shards in objects."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
from medloop.data.cache import cache_place, label_numbers, open_cache, rows_by_split
from medloop.data.manifest import Manifest
from medloop.data.parallel import ProgressFn
from medloop.data.shards import Layout, Shards
from medloop.errors import StorageFull
from medloop.storage.disk import free_bytes
from medloop.storage.objects import ObjectStore
from medloop.vision.prepare import PreparationSpec
from numpy.typing import NDArray

from medloop_trainer.images import Pixels
from medloop_trainer.settings import PixelSettings

log = logging.getLogger(__name__)

_SPARE: Final = 16 * 2**20  # bytes that are left to others on a disk, besides a twentieth of what is written


@dataclass(frozen=True)
class Prepared:
    """The prepared images of a version: `images` uint8 [N, S, S, C], `labels` int64 [N], places in the manifest's
    classes, and `shards` int32 [N], those that rows lie in when they are streamed. Row i is row i of the manifest."""

    images: Pixels
    labels: NDArray[np.int64]
    shards: NDArray[np.int32]


def open_prepared(
    manifest: Manifest,
    spec: PreparationSpec,
    objects: ObjectStore,
    folder: Path,
    settings: PixelSettings,
    progress: ProgressFn | None = None,
    free: Callable[[Path], int] = free_bytes,
) -> Prepared:
    """The version prepared by `spec`: as a cache in `folder` if there is one or room for one, else in shards. What is
    not there yet is made. `free` says how many bytes a disk has left.

    Raises what `open_cache` and `Shards.make` do; `StorageFull` only when there is room in neither place.
    """
    image_bytes = spec.size * spec.size * spec.channels
    layout = Layout.of(rows_by_split(manifest), image_bytes)
    size = len(manifest.rows) * image_bytes
    if cache_place(manifest, spec, folder).exists() or _cache_fits(size, folder, settings, free):
        try:
            cache = open_cache(manifest, spec, objects, folder, progress)
            return Prepared(cache.images, cache.labels, layout.shard)
        except StorageFull as exc:  # somebody else's files took the room meanwhile
            log.warning("decoded images are streamed: %s", exc)
    shards = Shards(manifest, spec, objects, layout, settings.stream_bytes)
    if not _fits(shards.missing_bytes(), objects, free):
        raise StorageFull(
            f"The decoded images take {size / 2**20:,.0f} MiB, more than there is room for under {folder} (or than "
            f"MEDLOOP_CACHE_BYTES allows), and in {objects.url}; free some space, name another disk with MEDLOOP_HOME, "
            "choose a smaller --size, or keep objects in S3, from where they are streamed."
        )
    log.info("decoded images take %d bytes, and are streamed from %s", size, objects.url)
    shards.make(progress)
    return Prepared(shards, label_numbers(manifest), layout.shard)


def _cache_fits(size: int, folder: Path, settings: PixelSettings, free: Callable[[Path], int]) -> bool:
    allowed = settings.cache_bytes is None or size <= settings.cache_bytes
    return allowed and _with_spare(size) <= free(folder)


def _fits(size: int, objects: ObjectStore, free: Callable[[Path], int]) -> bool:
    """Whether shards of `size` bytes can be stored. A bucket has no end; a folder has that of its disk."""
    parts = urlsplit(objects.url)
    return parts.scheme != "file" or not size or _with_spare(size) <= free(Path(url2pathname(parts.path)))


def _with_spare(size: int) -> int:
    return size + size // 20 + _SPARE
