"""Images for a browser: any file that MedLoop can read, as a PNG large enough to look at."""

import base64

import numpy as np
from medloop.vision.decode import Pixels, decode
from medloop.vision.dicom import is_dicom
from medloop.vision.dicom_reader import DicomReader
from medloop.vision.encode import encode_png
from medloop.vision.overlay import enlarge
from medloop.vision.prepare import PreparationSpec, prepare, prepare_pixels
from numpy.typing import NDArray

LARGEST_SIDE = 1024  # px: more would only make the page heavy
_SHOWN = PreparationSpec(mode="RGB", size=LARGEST_SIDE, fit="letterbox", filter="area")
_THUMBNAIL = PreparationSpec(mode="RGB", size=96, fit="letterbox", filter="area")


def plain_image(data: bytes, dicom: DicomReader) -> bytes:
    """The image file itself; of a DICOM file, a PNG of the very pixels that inference sees, and nothing else.

    Raises:
        InvalidImage, UnsupportedImage, ImageTooLarge, Overloaded, Unavailable: as `DicomReader.read`.
    """
    return encode_png(dicom.read(data).pixels) if is_dicom(data) else data


def viewable(data: bytes) -> bytes:
    """PNG of an image file; small ones are magnified by a whole factor, so that no pixel is invented.

    16-bit grey values are spread from the image's own smallest to its largest.

    Raises:
        InvalidImage, UnsupportedImage, ImageTooLarge: as `medloop.vision.decode.decode`.
    """
    pixels = decode(data).pixels
    if max(pixels.shape[:2]) > LARGEST_SIDE:
        return encode_png(prepare_pixels(pixels, _SHOWN))
    return enlarge(_eight_bits(pixels))


def thumbnail(data: bytes) -> str:
    """A `data:` address of a 96-pixel PNG, for a table cell.

    Raises:
        InvalidImage, UnsupportedImage, ImageTooLarge: as `medloop.vision.decode.decode`.
    """
    return "data:image/png;base64," + base64.b64encode(encode_png(prepare(data, _THUMBNAIL))).decode()


def _eight_bits(pixels: Pixels) -> NDArray[np.uint8]:
    if pixels.dtype == np.uint8:
        return pixels.astype(np.uint8, copy=False)
    low, high = int(pixels.min()), int(pixels.max())
    return ((pixels.astype(np.float64) - low) * 255 / max(high - low, 1)).round().astype(np.uint8)
