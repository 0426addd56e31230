"""What every kind of source gives: classes, a name, and images one after another."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from medloop.data.manifest import Scalar, Split
from medloop.errors import Issue

UNREADABLE = "unreadable"
"""The kind of the issues that `--skip-unreadable` turns into warnings."""

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".dcm", ".dicom"}
)
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class RawImage:
    """One image as it was found. `name` says where, for messages alone: it is not kept, since it may name a patient."""

    data: bytes
    label: str
    split: Split | None
    group: str
    name: str
    metadata: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Images to make a data set of.

    `classes` are in the order that a model's outputs will have; `count` is how many items `read` gives. `issues` are
    errors that were seen on opening, `warnings` what else a person should know. `read` may be called again, and gives
    an `Issue` in the place of an image that cannot be had. `origin` becomes each row's source: a word for the kind of
    place, never the place, so that the same data elsewhere is the same version.
    """

    classes: tuple[str, ...]
    suggested_name: str
    origin: str
    count: int
    read: Callable[[], Iterator[RawImage | Issue]]
    issues: tuple[Issue, ...] = ()
    warnings: tuple[Issue, ...] = ()


def slug(name: str) -> str:
    """`name` as the name of a lineage: lower case, in the characters that all places it goes to accept."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")[:63] or "dataset"


def ordered_classes(labels: Iterable[str]) -> tuple[str, ...]:
    """Class names sorted, numbers by value."""
    return tuple(
        sorted(set(labels), key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))
    )


def summed_up(kind: str, names: list[str], detail: str) -> tuple[Issue, ...]:
    """One issue for many files: how many, and the names of a few. None when there are no names."""
    if not names:
        return ()
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (Issue(kind, ", ".join(names[:_SHOWN]) + rest, f"{len(names)} × {detail}"),)
