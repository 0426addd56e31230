"""What can be wrong with a data set as a whole: errors, which stop a build, and warnings, which people should read."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from medloop.data.ingest import StoredImage
from medloop.data.manifest import Manifest
from medloop.data.sources.source import Source
from medloop.errors import Issue

_SHOWN = 5


def errors(images: Sequence[StoredImage]) -> Iterator[Issue]:
    """What makes these images no data set to train on."""
    if not images:
        yield Issue("no-images", "the source", "holds no image that can be read")
        return
    variants = _variants({image.label for image in images})
    for names in variants:
        where = ", ".join(f"{name!r} ({_given(images, name)})" for name in names)
        yield Issue("class-names-differ", where, "differ only in case or spaces; give the class one name")
    if len({image.label for image in images}) - sum(len(names) - 1 for names in variants) < 2:
        yield Issue("one-class", images[0].label, "is the only class; a classifier needs two")
    yield from _untrained(images, {name for names in variants for name in names})


def warnings(source: Source, images: Sequence[StoredImage], manifest: Manifest) -> Iterator[Issue]:
    """What a person should know about a version that was built."""
    for name in source.classes:
        if name not in manifest.classes:
            yield Issue("empty-class", name, "has no image; it is left out")
    counts = manifest.counts()
    for name in manifest.classes:
        if (total := sum(counts[split][name] for split in counts)) == 1:
            yield Issue("one-image-class", name, "has a single image, so nothing can be said about it")
        elif not counts["test"][name]:
            yield Issue("class-without-test", name, f"has no test image among its {total}, so it is never measured")
    modes = Counter(image.mode for image in images)
    if len(modes) > 1:
        parts = "; ".join(f"{mode}: {count:,}" for mode, count in modes.most_common())
        yield Issue(
            "mixed-modes", f"{len(images):,} images", f"are of different kinds ({parts}); preparation makes one"
        )
    yield from _conflicts(images)


def _variants(labels: set[str]) -> list[list[str]]:
    """Class names that only case and spaces tell apart."""
    alike: dict[str, list[str]] = defaultdict(list)
    for label in sorted(labels):
        alike[" ".join(label.split()).casefold()].append(label)
    return [names for names in alike.values() if len(names) > 1]


def _given(images: Sequence[StoredImage], label: str) -> str:
    """In which splits a class stands, for people."""
    return "/".join(sorted({image.given or "no split" for image in images if image.label == label}))


def _untrained(images: Sequence[StoredImage], told: set[str]) -> Iterator[Issue]:
    """Classes that are judged but never trained; `told` have their own issue."""
    trained = {image.label for image in images if image.given in ("train", None)}
    if not trained:
        yield Issue("no-train", "the source", "has no image in train; without it nothing can be learnt")
        return
    for label in sorted({image.label for image in images} - trained - told):
        where = f"{label!r} ({_given(images, label)})"
        yield Issue("class-not-in-train", where, "has no train image; add some or remove the class")


def _conflicts(images: Sequence[StoredImage]) -> Iterator[Issue]:
    """The same pixels under two labels."""
    by_pixels: dict[str, dict[str, str]] = defaultdict(dict)
    for image in images:
        by_pixels[image.pixel_hash].setdefault(image.label, image.name)
    conflicts = [names for names in by_pixels.values() if len(names) > 1]
    if conflicts:
        shown = "; ".join(
            " = ".join(f"{name} ({label})" for label, name in pair.items()) for pair in conflicts[:_SHOWN]
        )
        yield Issue(
            "label-conflict", shown, f"{len(conflicts)} × equal pixels with different labels; one must be wrong"
        )
