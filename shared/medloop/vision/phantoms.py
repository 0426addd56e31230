"""The synthetic set: drawn phantoms of six modality-like classes, so that the whole loop runs without anybody's data.

They borrow the gross layout of what they are named after, and teach nothing about medicine. Pose, build, contrast,
inversion (as between MONOCHROME1 and MONOCHROME2), shading and noise vary so much that the mean image of a class says
little: a linear model on pixels fails, a small convolutional network does not.

An image follows from (label, index, seed, size) alone, on every machine: random numbers are raw PCG64 output, and what
is computed from them uses only operations that IEEE 754 rounds exactly (+ − × ÷ √). Sines, exponentials and dot
products differ between libraries and processors.
"""

from collections.abc import Callable
from math import sqrt
from typing import Final

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.floating]  # float32 [S, S]: a coordinate, a distance, or a mask or brightness in 0–1

_HALF_VIEW: Final = 1.2  # anatomy is drawn within -1…1; the rest is what it may be shifted by
_GEOMETRY_DRAWS: Final = 128  # random numbers set aside for an image's geometry, whatever its size
_SHADES_ACROSS: Final = 9  # grid points of the smooth texture


class _Canvas:
    """An image being drawn, in coordinates about -1…1 (x to the right, y downwards) that are turned, moved and scaled.

    `brightness` is what has been drawn so far.
    """

    def __init__(self, size: int, bits: np.random.PCG64) -> None:
        # 53 bits of each raw number: a float64 in [0, 1), as Python floats so that planes stay float32.
        self._draws = iter(((bits.random_raw(_GEOMETRY_DRAWS) >> 11) * 2.0**-53).tolist())
        self.size, self.bits = size, bits
        turn, zoom, stretch = self.between(-0.35, 0.35), self.between(0.8, 1.1), self.between(0.9, 1.1)
        # The half-angle's tangent gives a rotation, here by up to ±39°, without a sine.
        cosine, sine = (1 - turn * turn) / (1 + turn * turn), 2 * turn / (1 + turn * turn)
        axis = ((np.arange(size) + 0.5) * (2 / size) - 1) * _HALF_VIEW
        across, down = axis - self.between(-0.2, 0.2), axis[:, np.newaxis] - self.between(-0.2, 0.2)
        self.x: Plane = ((across * cosine + down * sine) / (zoom * stretch)).astype(np.float32)
        self.y: Plane = ((down * cosine - across * sine) * stretch / zoom).astype(np.float32)
        self.sharpness = size / (2 * _HALF_VIEW)  # pixels a unit of length: edges are about one pixel wide
        self.brightness: Plane = np.zeros((size, size), dtype=np.float32)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(next(self._draws))

    def about(self, value: float, spread: float = 0.15) -> float:
        return value * self.between(1 - spread, 1 + spread)

    def ellipse(self, x: float, y: float, a: float, b: float) -> Plane:
        """Mask of an ellipse around (x, y) with half axes a and b."""
        u, v = (self.x - x) * (1 / a), (self.y - y) * (1 / b)
        return _clipped((1 - u * u - v * v) * (0.5 * self.sharpness * min(a, b)) + 0.5)

    def segment(self, start: tuple[float, float], end: tuple[float, float]) -> tuple[Plane, Plane]:
        """(distance to a line segment, position along it in 0–1): limbs and bones are made of it."""
        dx, dy = end[0] - start[0], end[1] - start[1]
        u, v = self.x - start[0], self.y - start[1]
        along = _clipped((u * dx + v * dy) * (1 / (dx * dx + dy * dy)))
        u, v = u - along * dx, v - along * dy
        return np.sqrt(u * u + v * v), along

    def nearer(self, distance: Plane, limit: float) -> Plane:
        """Mask of where `distance` is below `limit`."""
        return _clipped((limit - distance) * self.sharpness + 0.5)

    def lay(self, mask: Plane, level: float | Plane) -> None:
        """Cover what is there with `level` where `mask` is 1."""
        self.brightness += mask * (level - self.brightness)

    def spot(self, x: float, y: float, a: float, b: float, level: float) -> None:
        self.lay(self.ellipse(x, y, a, b), level)

    def texture(self) -> Plane:
        """Smooth random shades in 0–1: a coarse grid of random numbers, interpolated."""
        cells = _SHADES_ACROSS - 1
        grid = ((self.bits.random_raw(_SHADES_ACROSS**2) >> 11) * 2.0**-53).reshape(_SHADES_ACROSS, _SHADES_ACROSS)
        position = (np.arange(self.size) + 0.5) * (cells / self.size)
        low = position.astype(np.intp)
        weight = position - low
        rows = grid[low] + weight[:, np.newaxis] * (grid[low + 1] - grid[low])
        shades: Plane = (rows[:, low] + weight * (rows[:, low + 1] - rows[:, low])).astype(np.float32)
        return shades


def _clipped(plane: Plane) -> Plane:
    clipped: Plane = np.minimum(np.maximum(plane, 0), 1)
    return clipped


def _trunk(canvas: _Canvas) -> Plane:
    """A slice through a body lying on its back: fat, muscle, vertebra. Returns the mask of what muscle encloses."""
    width, depth = canvas.about(0.95, 0.06), canvas.about(0.7, 0.08)
    canvas.spot(0, 0, width, depth, canvas.about(0.28))
    canvas.spot(0, 0, width - 0.06, depth - 0.06, canvas.about(0.5))
    inside = canvas.ellipse(0, -0.02, width - 0.15, depth - 0.14)
    spine = depth - 0.26
    canvas.spot(0, spine, 0.15, 0.12, 0.95)
    canvas.spot(0, spine + 0.14, 0.05, 0.05, 0.45)
    for side in (-1, 1):
        canvas.spot(side * 0.16, spine + 0.15, 0.1, 0.03, 0.85)
    return inside


def _abdomen_ct(canvas: _Canvas) -> None:
    inside = _trunk(canvas)
    organ = canvas.about(0.68, 0.1)
    canvas.lay(canvas.ellipse(-0.36, -0.1, canvas.about(0.42), canvas.about(0.38)) * inside, organ)
    canvas.lay(canvas.ellipse(0.6, -0.02, 0.18, canvas.about(0.26)) * inside, organ * 0.95)
    for side in (-1, 1):  # kidneys, with their dark sinus
        y = canvas.between(0.18, 0.3)
        canvas.spot(side * 0.4, y, 0.13, canvas.about(0.17), organ + 0.14)
        canvas.spot(side * 0.36, y, 0.04, 0.07, 0.4)
    canvas.spot(0.04, 0.22, 0.065, 0.065, organ + 0.16)
    canvas.spot(canvas.between(0.15, 0.35), -0.32, canvas.about(0.2), 0.1, 0.06)  # gas in the stomach
    for _ in range(4):  # loops of bowel
        x, y, r = canvas.between(0.02, 0.55), canvas.between(-0.2, 0.14), canvas.between(0.06, 0.11)
        canvas.spot(x, y, r, r, 0.6)
        canvas.spot(x, y, r * 0.5, r * 0.5, 0.32)


def _chest_ct(canvas: _Canvas) -> None:
    inside = _trunk(canvas)
    for side in (-1, 1):
        lung = canvas.ellipse(
            side * 0.43, canvas.between(-0.06, 0.04), canvas.about(0.32, 0.1), canvas.about(0.46, 0.1)
        )
        canvas.lay(lung * inside, canvas.about(0.07, 0.5))
        for _ in range(5):  # vessels
            r = canvas.between(0.015, 0.035)
            canvas.spot(side * canvas.between(0.28, 0.62), canvas.between(-0.25, 0.28), r, r, 0.55)
    canvas.spot(canvas.between(0.06, 0.16), -0.16, canvas.about(0.26), canvas.about(0.22), canvas.about(0.62, 0.1))
    canvas.spot(0.1, 0.22, 0.075, 0.075, 0.68)
    canvas.spot(0, -0.57, 0.1, 0.035, 0.9)
    # Ribs are cut where they cross the slice: on both sides at four heights, just under the muscle.
    for x, y in ((0.5, -0.5), (0.76, -0.22), (0.78, 0.16), (0.52, 0.46)):
        for side in (-1, 1):
            canvas.spot(side * x, y + canvas.between(-0.04, 0.04), 0.06, 0.04, 0.9)


def _chest_xray(canvas: _Canvas) -> None:
    soft, dense = canvas.about(0.5, 0.1), canvas.about(0.8, 0.08)
    trunk = np.maximum(canvas.ellipse(0, 0.85, canvas.about(0.95, 0.05), 1.75), canvas.ellipse(0, -0.3, 0.95, 0.5))
    canvas.lay(np.maximum(trunk, canvas.nearer(np.abs(canvas.x), 0.24)), soft)  # with the neck
    lung_level = canvas.about(0.14, 0.4)
    for side in (-1, 1):
        canvas.spot(side * 0.42, -0.05, canvas.about(0.29, 0.1), canvas.about(0.66, 0.08), lung_level)
    # Ribs sink towards the sides; a folded coordinate draws them all at once.
    spacing = canvas.between(3.4, 4.6)
    phase = (canvas.y - canvas.x * canvas.x * canvas.between(0.4, 0.8)) * spacing + canvas.between(0, 1)
    ribs = canvas.nearer(np.abs(phase - np.floor(phase) - 0.5) * (1 / spacing), 0.035)
    canvas.brightness += ribs * canvas.ellipse(0, 0, 0.8, 0.8) * canvas.about(0.22, 0.3)
    canvas.lay(canvas.nearer(np.abs(canvas.x), 0.09), dense - 0.08)  # spine
    canvas.spot(canvas.between(0.1, 0.2), 0.26, canvas.about(0.3), canvas.about(0.3), dense)  # heart
    abdomen = canvas.nearer(-canvas.y, -0.9)
    for side in (-1, 1):
        abdomen = np.maximum(abdomen, canvas.ellipse(side * 0.45, 0.95, 0.52, canvas.about(0.42, 0.1)))
        clavicle, _ = canvas.segment((side * 0.1, -0.6), (side * 0.7, canvas.between(-0.8, -0.68)))
        canvas.lay(canvas.nearer(clavicle, 0.045), dense + 0.1)
    canvas.lay(abdomen * trunk, dense + 0.04)


def _breast_mri(canvas: _Canvas) -> None:
    shades = canvas.texture()
    fat = canvas.about(0.4, 0.2)
    depth = canvas.about(0.72, 0.12)
    for side in (-1, 1):
        canvas.spot(side * 0.5, 0.3, 0.49, depth + 0.03, fat + 0.25)  # skin
        canvas.spot(side * 0.5, 0.3, 0.46, depth, fat)
        gland = canvas.ellipse(side * 0.5, 0.06, canvas.about(0.28), canvas.about(0.36))
        canvas.lay(gland * _clipped(shades * 3 - 0.9), 0.9)
    canvas.spot(0, 1.0, 1.15, 0.72, canvas.about(0.5))  # chest wall
    for side in (-1, 1):
        canvas.spot(side * 0.5, 0.98, 0.4, 0.42, 0.05)
    canvas.spot(0.1, 0.86, canvas.about(0.24), canvas.about(0.28), canvas.about(0.75, 0.1))


# Knuckle and tip of each digit of a hand that points upwards, thumb first; and where along it the joints lie.
_DIGITS: Final = (
    ((-0.34, 0.3), (-0.8, -0.1)),
    ((-0.26, -0.08), (-0.42, -0.78)),
    ((-0.05, -0.14), (-0.08, -0.95)),
    ((0.15, -0.1), (0.24, -0.82)),
    ((0.32, 0.0), (0.52, -0.52)),
)
_JOINTS: Final = (0.02, 0.5, 0.78)


def _hand_xray(canvas: _Canvas) -> None:
    if canvas.between(0, 1) < 0.5:
        canvas.x = -canvas.x  # the other hand
    soft, bone = canvas.about(0.32, 0.2), canvas.about(0.8, 0.12)
    spread = canvas.between(0.7, 1.25)
    digits = []
    for (x0, y0), (x1, y1) in _DIGITS:
        tip = (x0 + (x1 - x0) * spread + canvas.between(-0.05, 0.05), y0 + (y1 - y0) * canvas.about(1, 0.1))
        digits.append(((x0, y0), canvas.segment((x0, y0), tip)))
    forearm, _ = canvas.segment((0, 0.5), (0, 1.6))
    flesh = canvas.ellipse(0, 0.25, 0.42, 0.44)
    for _, (distance, _) in digits:
        flesh = np.maximum(flesh, canvas.nearer(distance, 0.105))
    canvas.lay(np.maximum(flesh, canvas.nearer(forearm, 0.27)), soft)
    for (x, y), (distance, along) in digits:
        gap = np.minimum(np.minimum(np.abs(along - _JOINTS[0]), np.abs(along - _JOINTS[1])), np.abs(along - _JOINTS[2]))
        canvas.lay(canvas.nearer(distance, 0.055) * _clipped(gap * 40 - 0.6), bone)
        metacarpal, _ = canvas.segment((x * 0.95, y + 0.05), (x * 0.45, 0.48))
        canvas.lay(canvas.nearer(metacarpal, 0.05), bone)
    for x, y in ((-0.14, 0.6), (0.0, 0.58), (0.14, 0.6), (-0.08, 0.7), (0.08, 0.7)):  # carpal bones
        canvas.spot(x, y, 0.065, 0.055, bone)
    for side in (-1, 1):  # radius and ulna
        distance, _ = canvas.segment((side * 0.11, 0.84), (side * 0.11, 1.6))
        canvas.lay(canvas.nearer(distance, 0.075), bone)


def _head_ct(canvas: _Canvas) -> None:
    width, length = canvas.about(0.7, 0.07), canvas.about(0.88, 0.06)
    skull = canvas.about(0.06, 0.25)
    canvas.spot(0, 0, width + 0.05, length + 0.05, 0.35)  # scalp
    canvas.spot(0, 0, width, length, 1.0)
    brain = canvas.ellipse(0, 0, width - skull, length - skull)
    tissue = canvas.about(0.48, 0.12)
    canvas.lay(brain, tissue + 0.22 * (canvas.texture() - 0.5))
    canvas.lay(canvas.nearer(np.abs(canvas.x), 0.015) * brain, tissue + 0.15)  # falx
    spread, level = canvas.about(0.13, 0.25), tissue - 0.32
    for side in (-1, 1):  # lateral ventricles: front and back horn
        front, _ = canvas.segment((side * spread * 0.5, -0.02), (side * spread * 1.5, -0.34))
        back, _ = canvas.segment((side * spread * 0.5, 0.02), (side * spread * 1.7, 0.36))
        canvas.lay(canvas.nearer(np.minimum(front, back), canvas.about(0.06, 0.3)), level)
    canvas.spot(0, canvas.between(0.0, 0.06), 0.025, 0.09, level)


_DRAWINGS: Final[dict[str, Callable[[_Canvas], None]]] = {
    "phantom-abdomen-ct": _abdomen_ct,
    "phantom-breast-mri": _breast_mri,
    "phantom-chest-ct": _chest_ct,
    "phantom-chest-xray": _chest_xray,
    "phantom-hand-xray": _hand_xray,
    "phantom-head-ct": _head_ct,
}

CLASSES: Final = tuple(_DRAWINGS)


def phantom(label: str, index: int, seed: int, size: int = 64) -> NDArray[np.uint8]:
    """One synthetic image, uint8 [size, size, 1].

    Args:
        label: one of `CLASSES`.
        index: which image of the class, ≥ 0; drawn on its own, so that any subset gives the same images.
        seed: of the whole set, ≥ 0.
        size: side in pixels, ≥ 16; geometry does not depend on it, noise does.

    Raises:
        ValueError: an unknown label, a negative number, or a size below 16.
    """
    if label not in _DRAWINGS:
        raise ValueError(f"unknown phantom {label!r}: choose one of {', '.join(CLASSES)}")
    if size < 16:
        raise ValueError(f"a phantom needs at least 16 pixels a side, got {size}")
    canvas = _Canvas(size, np.random.PCG64(np.random.SeedSequence((seed, CLASSES.index(label), index))))
    _DRAWINGS[label](canvas)
    return _acquired(canvas)[..., np.newaxis]


def _acquired(canvas: _Canvas) -> NDArray[np.uint8]:
    """What a scanner makes of the drawing: uint8 [S, S] with contrast, shading, noise, and half the time inverted."""
    image = _clipped(canvas.brightness)
    image = image + canvas.between(-0.4, 0.4) * image * (1 - image)  # contrast bends, ends stay
    image = image + canvas.between(-0.12, 0.12) * canvas.x + canvas.between(-0.12, 0.12) * canvas.y
    image = image + canvas.between(0.05, 0.2) * (canvas.texture() - 0.5)
    gain, offset = canvas.between(130, 215), canvas.between(10, 40)
    if canvas.between(0, 1) < 0.5:
        gain, offset = -gain, 255 - offset
    noise = canvas.between(2, 12) * _noise(canvas.bits, canvas.size)
    levels: Plane = np.minimum(np.maximum(image * gain + offset + noise, 0), 255)
    return np.rint(levels).astype(np.uint8)


def _noise(bits: np.random.PCG64, size: int) -> Plane:
    """[S, S] of mean 0 and standard deviation 1, nearly normal: the sum of the four 16-bit parts of a raw number."""
    parts = bits.random_raw(size * size).astype("<u8").view("<u2").reshape(size, size, 4)
    total = parts.astype(np.int32).sum(axis=-1)  # whole numbers: no order of adding can change it
    noise: Plane = ((total - 2 * 65_535) * (sqrt(3) / 65_536)).astype(np.float32)
    return noise
