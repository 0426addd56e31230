"""The one preparation of pixels: what training, scoring, explaining and serving all show to a network.

How an image is brought to the network's size is data that travels in the bundle (`PreparationSpec`), and this is the
only code that carries it out, so that no two services can disagree by a bit. Normalisation comes later, in the graph.
"""

import hashlib
import json
from typing import Annotated, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from medloop.vision.decode import DEFAULT_LIMITS, Limits, Pixels, decode

# All but "nearest" widen their support when shrinking, so that fine structure is averaged instead of aliased.
_FILTERS: Final = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "area": Image.Resampling.BOX,
}


class PreparationSpec(BaseModel):
    """Everything that decides which pixels a network sees.

    Attributes:
        mode: "L" for one channel, "RGB" for three.
        size: side S of the prepared square, px.
        fit: "squash" ignores the aspect ratio, "letterbox" keeps it and pads with black, "crop" keeps the centre.
        filter: resampling kernel.
        window: grey values (low, high) of a 16-bit image that become 0 and 255; 8-bit images are left alone.
        alpha: the background that transparent pixels are laid on.
        depth16: without a window, 16-bit becomes 8-bit by the image's own smallest and largest value ("range"), or by
            dropping the low byte ("high_byte").
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    mode: Literal["L", "RGB"]
    size: Annotated[int, Field(ge=8, le=1024)]
    fit: Literal["squash", "letterbox", "crop"] = "squash"
    filter: Literal["nearest", "bilinear", "bicubic", "area"] = "bilinear"
    window: tuple[FiniteFloat, FiniteFloat] | None = None
    alpha: Literal["black", "white"] = "black"
    depth16: Literal["range", "high_byte"] = "range"

    @model_validator(mode="after")
    def _window_rises(self) -> Self:
        if self.window is not None and self.window[0] >= self.window[1]:
            raise ValueError("window must be (low, high) with low < high")
        return self

    @property
    def channels(self) -> int:
        return 1 if self.mode == "L" else 3

    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON of all fields: equal specs, and only they, have equal digests."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def prepare(data: bytes, spec: PreparationSpec, limits: Limits = DEFAULT_LIMITS) -> NDArray[np.uint8]:
    """Encoded image → uint8 [S, S, C], contiguous, with C = 1 ("L") or 3 ("RGB").

    Raises:
        InvalidImage, UnsupportedImage, ImageTooLarge: as `medloop.vision.decode.decode`.
    """
    return prepare_pixels(decode(data, limits).pixels, spec)


def prepare_pixels(pixels: Pixels, spec: PreparationSpec) -> NDArray[np.uint8]:
    """Decoded pixels ([H, W, C] as `Decoded` has them) → uint8 [S, S, C], contiguous.

    An image that has the wanted size and mode comes back bit for bit. RGB becomes grey by ITU-R BT.601, grey becomes
    RGB by repetition.

    Raises:
        ValueError: pixels of another shape or dtype.
    """
    if pixels.ndim != 3 or pixels.size == 0 or pixels.dtype not in (np.uint8, np.uint16) or pixels.shape[2] > 4:
        raise ValueError(f"pixels must be uint8 or uint16 [H, W, 1–4], got {pixels.dtype} {pixels.shape}")
    image = _without_alpha(_eight_bits(pixels, spec), 0 if spec.alpha == "black" else 255)
    if spec.mode == "L" and image.shape[2] == 3:
        image = np.asarray(Image.fromarray(image).convert("L"))[..., np.newaxis]
    image = _fit(image, spec)
    return np.ascontiguousarray(np.broadcast_to(image, (spec.size, spec.size, spec.channels)))


def _eight_bits(pixels: Pixels, spec: PreparationSpec) -> NDArray[np.uint8]:
    if pixels.dtype == np.uint8:
        return pixels.view(np.uint8)
    if spec.window is None and spec.depth16 == "high_byte":
        return (pixels >> 8).astype(np.uint8)
    low, high = spec.window or (float(pixels.min()), float(pixels.max()))
    if low == high:  # an image of one grey value has no range to spread
        return np.zeros(pixels.shape, dtype=np.uint8)
    table = np.rint((np.arange(65_536, dtype=np.float64) - low) * 255.0 / (high - low))
    return table.clip(0, 255).astype(np.uint8)[pixels]


def _without_alpha(image: NDArray[np.uint8], background: int) -> NDArray[np.uint8]:
    """[H, W, 2|4] laid on a background of one value → [H, W, 1|3]; others as they are."""
    if image.shape[2] not in (2, 4):
        return image
    # Whole numbers, so that every machine rounds alike: 255 × 255 + 127 fits in 16 bits.
    colour, alpha = image[..., :-1].astype(np.uint16), image[..., -1:].astype(np.uint16)
    return ((colour * alpha + background * (255 - alpha) + 127) // 255).astype(np.uint8)


def _fit(image: NDArray[np.uint8], spec: PreparationSpec) -> NDArray[np.uint8]:
    """[H, W, C] → [S, S, C]."""
    height, width = image.shape[:2]
    size, side = spec.size, min(height, width)
    if spec.fit == "crop":
        top, left = (height - side) // 2, (width - side) // 2
        return _resized(image[top : top + side, left : left + side], size, size, spec)
    if spec.fit == "squash":
        return _resized(image, size, size, spec)
    longest = max(height, width)
    inner_height, inner_width = (max(1, (edge * size + longest // 2) // longest) for edge in (height, width))
    top, left = (size - inner_height) // 2, (size - inner_width) // 2
    canvas = np.zeros((size, size, image.shape[2]), dtype=np.uint8)
    canvas[top : top + inner_height, left : left + inner_width] = _resized(image, inner_height, inner_width, spec)
    return canvas


def _resized(image: NDArray[np.uint8], height: int, width: int, spec: PreparationSpec) -> NDArray[np.uint8]:
    if image.shape[:2] == (height, width):
        return image
    squeezed = image[..., 0] if image.shape[2] == 1 else image
    resized = np.asarray(Image.fromarray(squeezed).resize((width, height), _FILTERS[spec.filter]))
    return resized.reshape(height, width, image.shape[2])
