"""Pictures for people: an image large enough to look at, and an attribution laid over it."""

from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medloop.vision.encode import encode_png

_MINIMUM_SIDE: Final = 256  # px: below this a person sees squares, not an image
_STRONGEST: Final = 99.0  # percentile of |attribution| that is drawn at full strength; single peaks would hide the rest
_OPACITY: Final = 0.7  # of the strongest colour, so that the anatomy below stays visible

# Ends of ColorBrewer's RdBu: told apart with any common colour blindness.
_SUPPORTS: Final = np.array([178, 24, 43], dtype=np.float64)
_OPPOSES: Final = np.array([33, 102, 172], dtype=np.float64)


def enlarge(pixels: NDArray[np.uint8], minimum_side: int = _MINIMUM_SIDE) -> bytes:
    """PNG of uint8 [H, W, 1|2|3|4], magnified by the smallest whole factor that brings both sides to `minimum_side`.

    Every pixel becomes a square of equal pixels: nothing is shown that the network did not see.
    """
    factor = _factor(pixels.shape[0], pixels.shape[1], minimum_side)
    return encode_png(_magnified(pixels, factor))


def overlay(pixels: NDArray[np.uint8], attribution: NDArray[np.floating], *, scale: int | None = None) -> bytes:
    """PNG of the image in grey with its attribution in colour: red speaks for the class, blue against it.

    The colour's strength is |a| over its 99th percentile (over its maximum where fewer than 1 % of the values differ
    from zero), so pictures compare where an image's attribution lies, not how large it is from image to image.

    Args:
        pixels: uint8 [H, W, 1|3].
        attribution: signed, [h, w]; of another size than the image it is stretched over it.
        scale: whole factor of magnification; by default the smallest that brings both sides to 256 px.

    Raises:
        ValueError: other shapes, or attributions that are not finite.
    """
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or attribution.ndim != 2:
        raise ValueError(f"an overlay needs [H, W, 1|3] and [h, w], got {pixels.shape} and {attribution.shape}")
    if not np.isfinite(attribution).all():
        raise ValueError("attributions must be finite")
    height, width = pixels.shape[:2]
    factor = scale or _factor(height, width, _MINIMUM_SIDE)
    grey = _magnified(_grey(pixels), factor).astype(np.float64)
    strength = _stretched(_normalised(attribution), height * factor, width * factor)[..., np.newaxis]
    colour = np.where(strength >= 0, _SUPPORTS, _OPPOSES)
    opacity = _OPACITY * np.abs(strength)
    return encode_png(np.rint(grey * (1 - opacity) + colour * opacity).astype(np.uint8))


def _factor(height: int, width: int, minimum_side: int) -> int:
    return max(1, -(-minimum_side // min(height, width)))


def _magnified(pixels: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def _grey(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[H, W, 1|3] → [H, W, 1]."""
    return pixels if pixels.shape[2] == 1 else np.asarray(Image.fromarray(pixels).convert("L"))[..., np.newaxis]


def _normalised(attribution: NDArray[np.floating]) -> NDArray[np.float32]:
    """To [-1, 1], keeping zero where it is."""
    values: NDArray[np.float64] = attribution.astype(np.float64)
    magnitude = np.abs(values)
    strongest = float(np.percentile(magnitude, _STRONGEST)) or float(magnitude.max()) or 1.0
    return (values / strongest).clip(-1, 1).astype(np.float32)


def _stretched(values: NDArray[np.float32], height: int, width: int) -> NDArray[np.float64]:
    """[h, w] → [height, width], bilinear: a coarse map (CAM) shows no edges that it does not have."""
    stretched = Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(stretched, dtype=np.float64)
