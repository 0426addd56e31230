"""From a source to a data set version: read, check, store, split, look for leaks.

Everything that is wrong is collected and told at once, by name. The version that names the images is written last, so
that a stopped build leaves no half version behind; images it stored are found again by the next one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from pydantic import TypeAdapter, ValidationError

from medloop.data import checks
from medloop.data.ingest import StoredImage, ingest
from medloop.data.leaks import LeakReport, find_leaks, leaks_key
from medloop.data.manifest import Manifest, Row, latest_version, lineage, load_manifest
from medloop.data.parallel import ProgressFn
from medloop.data.sources.source import UNREADABLE, Source
from medloop.data.splits import SplitItem, assign_splits
from medloop.errors import Conflict, InvalidDataset, InvalidRequest, Issue
from medloop.schemas import Name
from medloop.storage.objects import ObjectStore


@dataclass(frozen=True, slots=True)
class BuiltDataset:
    """A stored version; `issues` are warnings, since a build with errors raises."""

    manifest: Manifest
    leaks: LeakReport
    issues: tuple[Issue, ...]


def build_dataset(
    source: Source,
    objects: ObjectStore,
    *,
    name: str | None = None,
    skip_unreadable: bool = False,
    previous: Manifest | None = None,
    leak_distance: int = 2,
    progress: ProgressFn | None = None,
) -> BuiltDataset:
    """Build and store the version that `source` makes; the same data again gives the same version and adds nothing.

    `name` is the lineage (default: the source's suggestion) and `previous` the version whose splits are inherited
    (default: the lineage's newest). `leak_distance` is in bits of 64.

    Raises:
        InvalidDataset: with all errors as issues; with `skip_unreadable` unreadable images are warnings instead.
        Conflict: the lineage has other classes.
        InvalidRequest: `name` cannot be a name.
        StorageFull, StorageUnavailable: from `objects`.
    """
    name = _checked_name(name or source.suggested_name)
    images, left_out = _read(source, objects, skip_unreadable, progress)
    if previous is None and (newest := latest_version(objects, name)) is not None:
        previous = load_manifest(objects, newest, name=name)
    manifest = _manifest(name, source, images, previous)
    if manifest.id in lineage(objects, name):
        manifest = load_manifest(objects, manifest.id, name=name)
    phashes = {image.pixel_hash: image.phashes for image in images}
    leaks = find_leaks(
        manifest.rows, np.array([phashes[row.pixel_hash] for row in manifest.rows], dtype=np.uint64), leak_distance
    )
    objects.put(leaks_key(manifest.id), leaks.to_json().encode())
    manifest.save(objects)
    return BuiltDataset(manifest, leaks, (*source.warnings, *left_out, *checks.warnings(source, images, manifest)))


def _checked_name(name: str) -> str:
    try:
        return TypeAdapter(Name).validate_python(name)
    except ValidationError as exc:
        raise InvalidRequest(
            f"{name!r} cannot name a data set; use at most 63 of a-z, 0-9, '.', '_' and '-', a letter or digit first."
        ) from exc


def _read(
    source: Source, objects: ObjectStore, skip_unreadable: bool, progress: ProgressFn | None
) -> tuple[list[StoredImage], list[Issue]]:
    """All images, and the issues of those that were left out on purpose; raises with all errors otherwise."""
    images: list[StoredImage] = []
    wrong: list[Issue] = []
    left_out: list[Issue] = []
    for item in chain(source.issues, ingest(source, objects, progress)):
        if isinstance(item, StoredImage):
            images.append(item)
        elif skip_unreadable and item.kind == UNREADABLE:
            left_out.append(item)
        else:
            wrong.append(item)
    wrong += checks.errors(images)
    if wrong:
        raise InvalidDataset(_sentence(wrong), [*wrong, *left_out, *source.warnings])
    return images, left_out


def _sentence(wrong: Sequence[Issue]) -> str:
    first, *others = wrong
    more = f" There are {len(others)} more problems." if others else ""
    unreadable = any(issue.kind == UNREADABLE for issue in wrong)
    hint = " Repair unreadable files, or leave them out with --skip-unreadable." if unreadable else ""
    return f"The images are no data set yet: {first.where}: {first.detail.rstrip('.')}.{more}{hint}"


def _manifest(name: str, source: Source, images: Sequence[StoredImage], previous: Manifest | None) -> Manifest:
    classes = _classes(name, source, {image.label for image in images}, previous)
    splits = assign_splits(
        [SplitItem(image.pixel_hash, image.label, image.group, image.given) for image in images], previous
    )
    rows = (
        Row(
            byte_hash=image.byte_hash,
            pixel_hash=image.pixel_hash,
            label=image.label,
            split=split,
            group=image.group,
            source=source.origin,
            metadata=image.metadata,
            location=image.location,
        )
        for image, split in zip(images, splits, strict=True)
    )
    return Manifest(name, classes, tuple(rows), previous.id if previous else None)


def _classes(name: str, source: Source, labels: Iterable[str], previous: Manifest | None) -> tuple[str, ...]:
    """The classes that have images, in the source's order, or the lineage's where it is older."""
    present = set(labels)
    if previous is None:
        return tuple(label for label in source.classes if label in present)
    if present != set(previous.classes):
        raise Conflict(
            f"The data set {name} exists with the classes {', '.join(previous.classes)}, and these images have "
            f"{', '.join(sorted(present))}; choose another --name."
        )
    return previous.classes
