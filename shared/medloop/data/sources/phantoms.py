"""The built-in synthetic set as a source."""

from collections.abc import Iterator

from medloop.data.sources.source import RawImage, Source
from medloop.errors import Issue
from medloop.vision.encode import encode_png_canonical
from medloop.vision.phantoms import CLASSES, phantom


def phantom_source(per_class: int = 400, size: int = 64, seed: int = 0) -> Source:
    """`per_class` drawings of each class, `size` px a side, without splits; the same arguments give the same bytes."""

    def read() -> Iterator[RawImage | Issue]:
        for label in CLASSES:
            for index in range(per_class):
                data = encode_png_canonical(phantom(label, index, seed, size))
                yield RawImage(data, label, None, "", f"{label} {index}")

    return Source(CLASSES, "phantoms", "synthetic", per_class * len(CLASSES), read)
