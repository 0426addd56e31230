"""Whatever a kill or a bad disk leaves of a file: what is whole is read, nothing else is, and it is told."""

from hypothesis import given
from hypothesis import strategies as st
from medloop_inference.frames import Parsed, join_frames, parse_frames

PAYLOADS = st.lists(st.binary(max_size=20), min_size=1, max_size=5)


@given(payloads=PAYLOADS, data=st.data())
def test_cut_off_anywhere_the_whole_frames_before_are_read(payloads: list[bytes], data: st.DataObject) -> None:
    written = join_frames(payloads)
    ends = [len(join_frames(payloads[:count])) for count in range(len(payloads) + 1)]
    cut = data.draw(st.integers(0, len(written)))
    whole = sum(end <= cut for end in ends) - 1
    assert parse_frames(written[:cut]) == Parsed(payloads[:whole], cut not in ends, False)


@given(payloads=PAYLOADS, data=st.data())
def test_a_flipped_bit_is_never_read_and_always_told(payloads: list[bytes], data: st.DataObject) -> None:
    written = bytearray(join_frames(payloads))
    place = data.draw(st.integers(0, len(written) - 1))
    written[place] ^= 1 << data.draw(st.integers(0, 7))
    starts = [len(join_frames(payloads[:count])) for count in range(len(payloads))]
    hit = sum(start <= place for start in starts) - 1
    in_header = place < starts[hit] + 12
    parsed = parse_frames(bytes(written))
    assert parsed.damaged
    assert parsed.payloads == payloads[:hit] + ([] if in_header else payloads[hit + 1 :])


@given(payloads=PAYLOADS, zeros=st.integers(12, 100))
def test_zeros_that_a_power_failure_left_are_no_frames(payloads: list[bytes], zeros: int) -> None:
    assert parse_frames(join_frames(payloads) + bytes(zeros)) == Parsed(payloads, False, True)
