"""The one preparation: what it promises to everybody who relies on it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from medloop.vision.decode import decode
from medloop.vision.encode import encode_png, encode_png_canonical
from medloop.vision.prepare import PreparationSpec, prepare, prepare_pixels
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

SPECS = [
    PreparationSpec(mode=mode, size=size, fit=fit, filter=kernel)
    for mode, size, fit, kernel in [
        ("L", 8, "squash", "bilinear"),
        ("RGB", 24, "letterbox", "bicubic"),
        ("L", 24, "crop", "area"),
        ("RGB", 11, "squash", "nearest"),
    ]
]


@pytest.fixture(params=SPECS, ids=lambda spec: f"{spec.mode}-{spec.size}-{spec.fit}-{spec.filter}")
def spec(request: pytest.FixtureRequest) -> PreparationSpec:
    assert isinstance(request.param, PreparationSpec)
    return request.param


def test_every_sample_becomes_one_square_of_the_wanted_kind(sample: bytes, spec: PreparationSpec) -> None:
    prepared = prepare(sample, spec)
    assert prepared.shape == (spec.size, spec.size, spec.channels)
    assert prepared.dtype == np.uint8
    assert prepared.flags.c_contiguous


def test_preparing_its_own_result_changes_nothing(sample: bytes, spec: PreparationSpec) -> None:
    prepared = prepare(sample, spec)
    np.testing.assert_array_equal(prepare(encode_png(prepared), spec), prepared)
    np.testing.assert_array_equal(prepare(encode_png_canonical(prepared), spec), prepared)


def test_neither_order_nor_company_matters(samples: dict[str, bytes], spec: PreparationSpec) -> None:
    forward = {name: prepare(data, spec).tobytes() for name, data in samples.items()}
    backward = {name: prepare(samples[name], spec).tobytes() for name in reversed(samples)}
    assert forward == backward


def test_bytes_and_decoded_pixels_prepare_alike(sample: bytes, spec: PreparationSpec) -> None:
    np.testing.assert_array_equal(prepare(sample, spec), prepare_pixels(decode(sample).pixels, spec))


def test_the_callers_pixels_stay_untouched(spec: PreparationSpec) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (spec.size, spec.size, spec.channels), dtype=np.uint8)
    before = pixels.copy()
    prepare_pixels(pixels, spec)
    np.testing.assert_array_equal(pixels, before)


def test_matching_size_passes_through_bit_for_bit(spec: PreparationSpec) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (spec.size, spec.size, spec.channels), dtype=np.uint8)
    np.testing.assert_array_equal(prepare_pixels(pixels, spec), pixels)


def test_grey_becomes_colour_by_repetition(samples: dict[str, bytes]) -> None:
    grey = prepare(samples["jpeg-grey"], PreparationSpec(mode="L", size=10))
    colour = prepare(samples["jpeg-grey"], PreparationSpec(mode="RGB", size=10))
    np.testing.assert_array_equal(colour, np.repeat(grey, 3, axis=2))


def test_colour_becomes_grey_by_bt_601() -> None:
    colours = np.random.default_rng(2).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    luma = colours @ np.array([0.299, 0.587, 0.114])
    grey = prepare_pixels(colours, PreparationSpec(mode="L", size=16))[..., 0]
    assert np.abs(grey - luma).max() <= 0.51  # rounding, with weights in 16-bit fractions


@pytest.mark.parametrize(("background", "level"), [("black", 0), ("white", 255)])
def test_transparency_shows_the_chosen_background(background: Any, level: int) -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., :3] = 100
    pixels[:, 4:, 3] = 255
    pixels[0, 0, 3] = 51  # a fifth
    prepared = prepare_pixels(pixels, PreparationSpec(mode="RGB", size=8, alpha=background))
    assert (prepared[1:, :4] == level).all()
    assert (prepared[:, 4:] == 100).all()
    assert (prepared[0, 0] == round(0.2 * 100 + 0.8 * level)).all()


def test_letterbox_keeps_the_aspect_ratio_and_pads_with_black() -> None:
    wide = np.full((10, 40, 1), 200, np.uint8)
    prepared = prepare_pixels(wide, PreparationSpec(mode="L", size=20, fit="letterbox"))[..., 0]
    rows = np.flatnonzero(prepared.any(axis=1))
    assert (rows[0], rows[-1]) == (7, 11)
    assert (prepared[rows] == 200).all()


def test_letterbox_keeps_at_least_one_row() -> None:
    line = np.full((1, 4000, 1), 200, np.uint8)
    assert prepare_pixels(line, PreparationSpec(mode="L", size=16, fit="letterbox")).any()


def test_crop_keeps_the_centre() -> None:
    pixels = np.zeros((16, 48, 1), np.uint8)
    pixels[:, 16:32] = 90
    assert (prepare_pixels(pixels, PreparationSpec(mode="L", size=16, fit="crop")) == 90).all()


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic", "area"])
def test_shrinking_averages_instead_of_aliasing(kernel: Any) -> None:
    board = ((np.indices((64, 64)).sum(axis=0) % 2) * 255).astype(np.uint8)[..., np.newaxis]
    prepared = prepare_pixels(board, PreparationSpec(mode="L", size=16, filter=kernel))
    assert np.abs(prepared[2:-2, 2:-2].astype(int) - 127).max() <= 2


def test_deep_grey_by_range_window_and_high_byte() -> None:
    pixels = np.linspace(1000, 3000, 64).astype(np.uint16).reshape(8, 8, 1)
    by_range = prepare_pixels(pixels, PreparationSpec(mode="L", size=8))
    by_window = prepare_pixels(pixels, PreparationSpec(mode="L", size=8, window=(2000, 2500)))
    by_byte = prepare_pixels(pixels, PreparationSpec(mode="L", size=8, depth16="high_byte"))
    assert (by_range.min(), by_range.max()) == (0, 255)
    np.testing.assert_array_equal(by_window == 0, pixels <= 2000)
    np.testing.assert_array_equal(by_window == 255, pixels >= 2500)
    np.testing.assert_array_equal(by_byte, pixels // 256)


def test_deep_grey_of_one_value_is_black() -> None:
    assert not prepare_pixels(np.full((9, 9, 1), 5000, np.uint16), PreparationSpec(mode="L", size=8)).any()


def test_window_leaves_8_bit_images_alone(samples: dict[str, bytes]) -> None:
    plain, windowed = PreparationSpec(mode="L", size=9), PreparationSpec(mode="L", size=9, window=(10, 20))
    np.testing.assert_array_equal(prepare(samples["png-grey"], plain), prepare(samples["png-grey"], windowed))


def test_result_equals_the_librarys_resize(samples: dict[str, bytes]) -> None:
    grey = decode(samples["png-grey"]).pixels
    expected = np.asarray(Image.fromarray(grey[..., 0]).resize((32, 32), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(prepare(samples["png-grey"], PreparationSpec(mode="L", size=32))[..., 0], expected)


@pytest.mark.parametrize(
    "pixels", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 5), np.uint8), np.zeros((4, 4, 1), np.float32)]
)
def test_pixels_of_another_layout_are_refused(pixels: Any) -> None:
    with pytest.raises(ValueError, match="pixels must be"):
        prepare_pixels(pixels, PreparationSpec(mode="L", size=8))


def test_digest_names_the_spec_and_nothing_else() -> None:
    base: dict[str, Any] = {"mode": "L", "size": 64}
    variants: list[dict[str, Any]] = [
        {},
        {"mode": "RGB"},
        {"size": 65},
        {"fit": "crop"},
        {"filter": "area"},
        {"window": (0, 1)},
    ]
    variants += [{"alpha": "white"}, {"depth16": "high_byte"}]
    digests = {PreparationSpec.model_validate(base | variant).digest() for variant in variants}
    assert len(digests) == len(variants)
    spec = PreparationSpec(mode="L", size=64)
    assert PreparationSpec.model_validate_json(spec.model_dump_json()).digest() == spec.digest()
    assert spec.digest()[:16] == "1d62bc4f926809ea"  # stored in bundles and cache names


@pytest.mark.parametrize(
    "change",
    [{"size": 7}, {"size": 1025}, {"mode": "RGBA"}, {"window": (5, 5)}, {"window": (0, float("inf"))}, {"blur": 1}],
    ids=str,
)
def test_specs_that_make_no_sense_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PreparationSpec.model_validate({"mode": "L", "size": 64} | change)


def test_a_spec_cannot_be_changed_afterwards(make_picture: Callable[[int], NDArray[np.uint8]]) -> None:
    spec = PreparationSpec(mode="L", size=8)
    with pytest.raises(ValidationError):
        spec.size = 9  # type: ignore[misc]
