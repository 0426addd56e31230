"""Coverage-guided fuzzing of decoding, for long sessions: `python tests/fuzz/decode.py CORPUS -max_total_time=600`.

Needs `pip install atheris`, which nothing else here does. CORPUS is a folder, empty or with images to start from. The
session ends with a traceback, and a file that repeats it, at the first input that is neither decoded nor refused.
"""

import sys

import atheris  # type: ignore[import-untyped]

with atheris.instrument_imports(include=["medloop.vision"]):
    from medloop.errors import InvalidImage
    from medloop.vision.decode import Limits, decode
    from medloop.vision.encode import strip_metadata

_LIMITS = Limits(max_pixels=200_000)


def one(data: bytes) -> None:
    try:
        pixels = decode(data, _LIMITS).pixels
        stripped = decode(strip_metadata(data, _LIMITS), _LIMITS).pixels
    except InvalidImage:
        return
    if (pixels != stripped).any():
        raise ValueError("stripping metadata changed the pixels")


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
