"""Class folders: in a folder, in a .zip (nothing is unpacked to disk), or below an S3 prefix.

[anything/]CLASS/…/image            or            [anything/](train|val|test|…)/CLASS/…/image
"""

import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from medloop.data.manifest import Split
from medloop.data.parallel import NETWORK_WORKERS, ordered_map
from medloop.data.sources.dicom import plain_image
from medloop.data.sources.source import IMAGE_SUFFIXES, UNREADABLE, RawImage, Source, ordered_classes, slug, summed_up
from medloop.data.splits import split_named
from medloop.errors import InvalidDataset, Issue, NotFound
from medloop.storage.objects import open_objects
from medloop.vision.decode import DEFAULT_LIMITS

Read = Callable[[Sequence[str]], Iterator[bytes | Issue]]
"""Gives the content of each path, or why it cannot be had."""


@dataclass(frozen=True, slots=True)
class _Place:
    path: str
    label: str
    split: Split | None


def folder_source(folder: Path) -> Source:
    """Class folders on this machine. Raises `InvalidDataset` when it cannot be read."""
    try:
        paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    except OSError as exc:
        raise InvalidDataset(f"{folder} cannot be read ({exc.strerror}); check its permissions.") from exc
    return _class_folders(paths, folder.resolve().name, lambda wanted: _read_files(folder, wanted))


def zip_source(path: Path) -> Source:
    """Class folders in a .zip. Raises `InvalidDataset` when it is not one."""
    try:
        with zipfile.ZipFile(path) as archive:
            paths = [info.filename for info in archive.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, OSError, ValueError) as exc:
        raise InvalidDataset(f"{path.name} is no readable .zip; download it again.") from exc
    return _class_folders(paths, path.stem, lambda wanted: _read_members(path, wanted))


def prefix_source(url: str) -> Source:
    """Class folders below `s3://bucket/prefix`. Raises `StorageUnavailable` when S3 does not answer."""
    store = open_objects(url)

    def fetch(key: str) -> bytes | Issue:
        try:
            return store.get(key)
        except NotFound:
            return Issue(UNREADABLE, key, "was deleted while the data set was read; start again")

    name = PurePosixPath(url).name
    return _class_folders(list(store.list()), name, lambda wanted: ordered_map(fetch, wanted, workers=NETWORK_WORKERS))


def _class_folders(paths: Sequence[str], name: str, read: Read) -> Source:
    visible = sorted({path for path in paths if not _hidden(path)})
    images = [path for path in visible if PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES]
    others = [path for path in visible if PurePosixPath(path).suffix.lower() not in IMAGE_SUFFIXES]
    places, issues = _layout(images)
    return Source(
        classes=ordered_classes(place.label for place in places),
        suggested_name=slug(name),
        origin="class-folders",
        count=len(places),
        read=lambda: _images(places, read),
        issues=issues,
        warnings=summed_up("ignored-file", others, "no image by its ending; it was left out"),
    )


def _hidden(path: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))


def _layout(paths: Sequence[str]) -> tuple[list[_Place], tuple[Issue, ...]]:
    """Class and split of each path, by the folders it lies in."""
    parts = {path: tuple(path.split("/")) for path in paths}
    while _wrapped(parts):
        parts = {path: tail[1:] for path, tail in parts.items()}
    tops = {tail[0] for tail in parts.values() if len(tail) > 1}
    split_above = any(split_named(top) == "train" for top in tops)
    places, outside, classless = [], [], []
    for path, tail in parts.items():
        split = split_named(tail[0]) if split_above and len(tail) > 1 else None
        if split_above and split is None:
            outside.append(path)
        elif len(tail) < (3 if split_above else 2):
            classless.append(path)
        else:
            places.append(_Place(path, tail[1] if split_above else tail[0], split))
    return places, (
        *summed_up("outside-splits", outside, "lies beside the train, val and test folders; move it into one"),
        *summed_up("no-class", classless, "lies in no class folder; move it into one"),
    )


def _wrapped(parts: dict[str, tuple[str, ...]]) -> bool:
    """Whether all lies in one folder that says nothing, as in most archives."""
    tops = {tail[0] for tail in parts.values()}
    return len(tops) == 1 and min(map(len, parts.values())) >= 3 and split_named(min(tops)) is None


def _images(places: Sequence[_Place], read: Read) -> Iterator[RawImage | Issue]:
    for place, data in zip(places, read([place.path for place in places]), strict=True):
        plain, group = plain_image(data, place.path)
        yield plain if isinstance(plain, Issue) else RawImage(plain, place.label, place.split, group, place.path)


def _read_files(folder: Path, paths: Sequence[str]) -> Iterator[bytes | Issue]:
    for path in paths:
        yield read_file(folder / path, path)


def read_file(file: Path, name: str) -> bytes | Issue:
    """A file's content unless it is too large to be an image or cannot be read; `name` is for the message."""
    try:
        if (size := file.stat().st_size) > DEFAULT_LIMITS.max_bytes:
            return _too_large(name, size)
        return file.read_bytes()
    except OSError as exc:
        return Issue(UNREADABLE, name, f"cannot be read: {exc.strerror or type(exc).__name__}")


def _read_members(path: Path, names: Sequence[str]) -> Iterator[bytes | Issue]:
    with zipfile.ZipFile(path) as archive:
        for name in names:
            # A member gives no more than its header says, so checking that guards against archives that blow up.
            if (size := archive.getinfo(name).file_size) > DEFAULT_LIMITS.max_bytes:
                yield _too_large(name, size)
                continue
            try:
                yield archive.read(name)
            except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError) as exc:
                yield Issue(UNREADABLE, name, f"is damaged inside the .zip: {exc}")
            except (RuntimeError, NotImplementedError):
                yield Issue(UNREADABLE, name, "is encrypted or packed in an unknown way; pack it again with plain zip")


def _too_large(name: str, size: int) -> Issue:
    allowed = DEFAULT_LIMITS.max_bytes >> 20
    return Issue(UNREADABLE, name, f"has {size >> 20:,} MiB, more than the {allowed} MiB that an image may have")
