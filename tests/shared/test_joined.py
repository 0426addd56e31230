"""What is written in one turn of the event loop leaves together, in order, and nothing of it is lost at the end."""

import asyncio

import pytest
from medloop.http.joined import Joined

pytestmark = pytest.mark.anyio


class Wire(asyncio.Transport):
    """Keeps what is sent, write by write."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []
        self.closed = self.aborted = self.ended = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.closed
        self.sent.append(bytes(data))

    def write_eof(self) -> None:
        self.ended = True

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return 100


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
async def joined(wire: Wire) -> Joined:
    return Joined(wire, asyncio.get_running_loop())


async def test_one_turn_is_one_write(wire: Wire, joined: Joined) -> None:
    joined.write(b"head ")
    joined.write(b"body")
    assert (wire.sent, joined.get_write_buffer_size()) == ([], 109)
    await asyncio.sleep(0)
    joined.write(b"next")
    await asyncio.sleep(0)
    assert (wire.sent, joined.get_write_buffer_size()) == ([b"head body", b"next"], 100)


async def test_what_was_written_goes_out_before_the_end(wire: Wire, joined: Joined) -> None:
    joined.write(b"last")
    joined.close()
    await asyncio.sleep(0)
    assert (wire.sent, wire.closed, joined.is_closing()) == ([b"last"], True, True)


async def test_the_end_of_writing_comes_last(wire: Wire, joined: Joined) -> None:
    joined.write(b"last")
    joined.write_eof()
    assert (wire.sent, wire.ended) == ([b"last"], True)


async def test_an_aborted_connection_sends_nothing_more(wire: Wire, joined: Joined) -> None:
    joined.write(b"never")
    joined.abort()
    await asyncio.sleep(0)
    assert (wire.sent, wire.aborted) == ([], True)
