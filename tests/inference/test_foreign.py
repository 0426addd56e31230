"""What bodies of others may cost: memory in proportion to what was sent, and nobody's time on the event loop."""

import gc
import threading
import tracemalloc
from typing import Any

import anyio
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from medloop.errors import BodyTooLarge, InvalidRequest
from medloop.vision.prepare import PreparationSpec
from medloop_inference.foreign import MAX_IMAGES, MAX_JSON, MAX_LISTS, check_json, parsed, pixels_of

SPEC = PreparationSpec(mode="L", size=8)


@pytest.mark.parametrize(
    "values",
    [["A" * 200_000] + [1] * 255, [["A" * 200_000] + [1] * 3] * 4, [1] * 255 + [10**4000], [[1], 2] * 128],
    ids=["text", "nested", "number", "ragged"],
)
def test_what_is_no_pixels_is_refused_before_memory_is_taken_for_it(values: list[Any]) -> None:
    tracemalloc.start()
    try:
        for shape in (None, (4, 8, 8, 1)):
            with pytest.raises(InvalidRequest):
                pixels_of(values, SPEC, shape)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(8, 10), st.sampled_from(["L", "RGB"]), st.integers(0, 2**32 - 1))
def test_pixels_are_what_the_numbers_say(count: int, size: int, mode: Any, seed: int) -> None:
    spec = PreparationSpec(mode=mode, size=size)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size, size, spec.channels), np.uint8)
    for numbers, shape in [(pixels, None), (pixels, pixels.shape), (pixels.ravel(), pixels.shape)]:
        found = pixels_of(numbers.tolist(), spec, shape)
        assert found.dtype == np.uint8
        assert np.array_equal(found, pixels)


@pytest.mark.parametrize(
    "text",
    [b" " * (MAX_JSON + 1), b"[" * (MAX_LISTS + 1), b'"a":0,' * 2**14, b"{}," * 2**15],
    ids=["long", "lists", "keys", "objects"],
)
def test_json_of_too_many_objects_is_not_parsed(text: bytes) -> None:
    with pytest.raises(BodyTooLarge, match="/v1/predict/stream"):
        check_json(text)
    check_json(b'{"inputs":[' + b'{"image":{"b64":"QUJD"}},' * MAX_IMAGES + b"]}")


@pytest.mark.anyio
async def test_one_is_parsed_at_a_time_while_the_loop_goes_on() -> None:
    go_on, at_once, most = threading.Event(), 0, 0

    def parse() -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        assert go_on.wait(60)
        assert not gc.isenabled()
        at_once -= 1

    async with anyio.create_task_group() as parsing:
        parsing.start_soon(lambda: parsed(parse, 2**20))
        parsing.start_soon(lambda: parsed(parse, 10, packed=True))
        with anyio.fail_after(30):
            assert await parsed(lambda: "small", 10) == "small"
            while not at_once:
                await anyio.sleep(0.01)
        await anyio.sleep(0.05)
        go_on.set()
    assert (most, at_once) == (1, 0)
    assert gc.isenabled()
