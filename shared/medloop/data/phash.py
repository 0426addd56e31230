"""Perceptual hashes: 64 bits that stay nearly the same while an image is scaled, brightened or compressed again.

The DCT hash of Zauner ("Implementation and Benchmarking of Perceptual Image Hash Functions", 2010): the image in grey
at 32×32, its type-II discrete cosine transform, of that the 8×8 lowest frequencies, and for each of them one bit that
tells whether it lies above their median.

Data sets are often enlarged by mirrored and turned copies, which that hash alone does not see. Mirroring an image
changes the sign of its odd frequencies, and transposing it transposes them, so all eight forms cost one transform.
"""

from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from medloop.vision.decode import Pixels

SIDE: Final = 32  # px
FORMS: Final = 8  # mirrored or not in each direction, transposed or not
_LOW: Final = 8
_LUMA: Final = (0.299, 0.587, 0.114)  # ITU-R BT.601


def hash_plane(pixels: Pixels) -> NDArray[np.float64]:
    """What is hashed of an image [H, W, C]: grey, averaged over areas to [32, 32], 0 to 255; transparent is black."""
    channels = [pixels[..., channel].astype(np.float32) for channel in range(pixels.shape[2])]
    plane = channels[0]
    if len(channels) > 2:
        red, green, blue = _LUMA
        plane = red * channels[0] + green * channels[1] + blue * channels[2]
    if len(channels) in (2, 4):
        plane *= channels[-1] / 255
    if pixels.dtype == np.uint16:
        plane /= 257  # 65,535 → 255
    return _averaged(_averaged(plane).T).T


def perceptual_hashes(planes: NDArray[np.float64]) -> NDArray[np.uint64]:
    """The hashes of planes [N, 32, 32], uint64 [N, 8]: the upright form first; the constant term is the highest bit."""
    basis = _cosines()
    # Rounded, so that a flat image's zeros are zeros and not the noise of the sums.
    upright = np.round(basis @ planes @ basis.T, 2)
    odd = np.where(np.arange(_LOW) % 2, -1.0, 1.0)
    forms = [
        low * rows[:, np.newaxis] * columns
        for low in (upright, upright.transpose(0, 2, 1))
        for rows in (np.ones(_LOW), odd)
        for columns in (np.ones(_LOW), odd)
    ]
    low = np.stack(forms, axis=1).reshape(len(planes), FORMS, _LOW * _LOW)
    bits = low > np.median(low, axis=2, keepdims=True)
    return np.packbits(bits, axis=2).view(">u8").astype(np.uint64).reshape(len(planes), FORMS)


def _averaged(plane: NDArray[np.floating]) -> NDArray[np.float64]:
    """[H, W] → [32, W]: the mean of each 32nd of the height, pixels on a border counted by the part that lies inside.

    Without a matrix product: many threads do this at once, and BLAS would start more of its own in each.
    """
    height = plane.shape[0]
    total = np.zeros((height + 1, plane.shape[1]))
    np.cumsum(plane, axis=0, out=total[1:])
    edges = np.arange(SIDE + 1) * (height / SIDE)
    whole = np.minimum(edges.astype(np.intp), height - 1)
    up_to = total[whole] + (edges - whole)[:, np.newaxis] * plane[whole]
    means: NDArray[np.float64] = np.diff(up_to, axis=0) * (SIDE / height)
    return means


@cache
def _cosines() -> NDArray[np.float64]:
    """[8, 32]: the orthonormal DCT-II of 32 samples, lowest 8 frequencies."""
    frequency = np.arange(_LOW)[:, np.newaxis]
    sample = np.arange(SIDE)[np.newaxis, :]
    basis: NDArray[np.float64] = np.cos(np.pi * frequency * (2 * sample + 1) / (2 * SIDE)) * np.sqrt(2 / SIDE)
    basis[0] /= np.sqrt(2)
    return basis
