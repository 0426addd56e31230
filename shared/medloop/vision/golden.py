"""Synthetic image files that push every branch of decoding: what a bundle's golden inputs are made of."""

from io import BytesIO

import numpy as np
from PIL import Image

from medloop.vision.phantoms import CLASSES, phantom

_ORIENTATION = 0x0112  # EXIF tag


def awkward_images(size: int, seed: int = 0) -> tuple[bytes, ...]:
    """Grey and colour JPEG, PNG, 16-bit, alpha, palette and EXIF-rotated files, some of them not square.

    `size` in pixels is the preparation's: one file has exactly that size, the others must be resampled.
    """
    grey = [phantom(label, index, seed, size * 2)[..., 0] for index, label in enumerate(CLASSES[:4])]
    colour = np.stack(grey[:3], axis=-1)
    alpha = np.linspace(0, 255, size * 2).astype(np.uint8)[None, :].repeat(size * 2, axis=0)
    exif = Image.Exif()
    exif[_ORIENTATION] = 6
    exact = Image.fromarray(phantom(CLASSES[0], 9, seed, size)[..., 0])
    return (
        _encode(exact, "PNG"),
        _encode(Image.fromarray(grey[0]), "JPEG", quality=90),
        _encode(Image.fromarray(colour[: size + 3]), "JPEG", quality=80),
        _encode(Image.fromarray(colour), "PNG"),
        _encode(Image.fromarray(grey[1].astype(np.uint16) * 16 + 7), "PNG"),
        _encode(Image.fromarray(np.dstack([colour, alpha])), "PNG"),
        _encode(Image.fromarray(colour).quantize(32), "PNG"),
        _encode(Image.fromarray(grey[2][: size + 5]), "JPEG", exif=exif, quality=90),
    )


def _encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()
