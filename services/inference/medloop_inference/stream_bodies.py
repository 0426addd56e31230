"""Images out of a body that is still arriving, one after the other: lines of JSON, or the parts of a form.

Neither ever holds more than one image and what has arrived of the next, which counts as the request's share of what all
may hold: where they hold too much, it is let go. What is no image, or was let go, becomes an error in its place; when
the body itself is broken, or keeps an image that has begun from ending, reading ends with InvalidRequest.
"""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final

import anyio
from medloop.errors import BodyTooSlow, ImageTooLarge, InvalidRequest, MedLoopError
from medloop.http.held import Share
from medloop.vision.decode import DEFAULT_LIMITS
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from medloop_inference.foreign import LARGEST_FRAME, from_base64, parsed

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks  # a name for type checkers only

MAX_IMAGE: Final = DEFAULT_LIMITS.max_bytes
MAX_LINE: Final = 24 * 2**20
"""Bytes of a line: room for an image of 16 MiB. A line is in memory thrice while it is read, and raw parts are not."""
ENTRY_SECONDS: Final = 60.0
"""How long an image that has begun may be waited for, so that nobody fills memory with pieces that never end."""
_MAX_VALUES = 2**14  # that a line's JSON may hold: three, and an `id` may have a few thousand commas in it

Name = Annotated[str, Field(max_length=4096)] | int | None


class Line(BaseModel):
    """One image of an NDJSON body: `id` comes back with its answer, `frame` is of a multi-frame DICOM, from 1."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    id: Name = None
    image: str
    frame: int | None = Field(default=None, ge=1, le=LARGEST_FRAME)


@dataclass(frozen=True, slots=True)
class Entry:
    """The image at place `index` (from 0) of a stream, or why there is none."""

    index: int
    id: str | int | None
    image: bytes | MedLoopError
    frame: int | None = None


class _Arriving:
    """A body's chunks, as they come. While an entry has `begun`, only so much time is spent on waiting for its rest:
    that of the sender, for a service that is busy reads slowly itself."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self._left = ENTRY_SECONDS
        self.begun = False

    def next_entry(self) -> None:
        self.begun, self._left = False, ENTRY_SECONDS

    def __aiter__(self) -> "_Arriving":
        return self

    async def __anext__(self) -> bytes:
        if not self.begun:
            return await anext(self._chunks)
        started = anyio.current_time()
        try:
            with anyio.fail_after(self._left):
                chunk = await anext(self._chunks)
        except TimeoutError as exc:
            raise BodyTooSlow(
                f"An image of the stream had not arrived after {ENTRY_SECONDS:g} s of waiting for it; send it faster."
            ) from exc
        self._left -= anyio.current_time() - started
        return chunk


def _too_large() -> ImageTooLarge:
    return ImageTooLarge(f"The image file is larger than the {MAX_IMAGE / 2**20:.0f} MiB that are allowed.")


def _line_too_large() -> ImageTooLarge:
    return ImageTooLarge(
        f"The line is longer than the {MAX_LINE / 2**20:.0f} MiB that are allowed; send an image of more than "
        f"{MAX_LINE * 2 // 3 / 2**20:.0f} MiB as a part of a form (multipart/form-data)."
    )


class _Unfinished:
    """What has arrived of an entry, up to `most` bytes that `share` counts. Of one that cannot be held nothing is kept
    but why."""

    def __init__(self, share: Share, most: int, too_large: Callable[[], MedLoopError]) -> None:
        self._share, self._most, self._too_large = share, most, too_large
        self._counted = 0
        self.data = bytearray()
        self.refusal: MedLoopError | None = None

    def add(self, piece: bytes) -> None:
        if self.refusal is not None:
            return
        if len(self.data) + len(piece) > self._most:
            self._let_go(self._too_large())
            return
        self.data += piece
        self._counted += len(piece)
        if (overloaded := self._share.add(len(piece))) is not None:
            self._let_go(overloaded)

    def next_entry(self) -> None:
        self._share.remove(self._counted)
        self._counted = 0
        self.data, self.refusal = bytearray(), None

    def _let_go(self, why: MedLoopError) -> None:
        self.next_entry()
        self.refusal = why


async def read_lines(chunks: AsyncIterator[bytes], share: Share) -> AsyncIterator[Entry]:
    """The entries of an NDJSON body; blank lines count for nothing."""
    index, line = 0, _Unfinished(share, MAX_LINE, _line_too_large)
    arriving = _Arriving(chunks)
    async for chunk in _ended(arriving):
        *complete, rest = chunk.split(b"\n")
        for piece in complete:
            line.add(piece)
            entry = None
            if line.refusal is not None or (line.data and not line.data.isspace()):
                entry = await _entry(index, line.refusal or line.data)
                index += 1
            line.next_entry()
            if entry is not None:
                yield entry
            arriving.next_entry()
        line.add(rest)
        arriving.begun = line.refusal is not None or bool(line.data)


async def _ended(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The last line may lack its end."""
    async for chunk in chunks:
        yield chunk
    yield b"\n"


async def _entry(index: int, line: bytearray | MedLoopError) -> Entry:
    if isinstance(line, MedLoopError):
        return Entry(index, None, line)
    return await parsed(lambda: _read_line(index, line), len(line))


def _read_line(index: int, line: bytearray) -> Entry:
    if sum(line.count(mark) for mark in (b",", b"[", b"{")) > _MAX_VALUES:  # before anything is made of them
        return Entry(index, None, InvalidRequest('Lines must be {"id": …, "image": base64}, and nothing else.'))
    try:
        said = Line.model_validate_json(line)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "the line"
        return Entry(
            index, None, InvalidRequest(f'Lines must be {{"id": …, "image": base64}}; {where}: {first["msg"]}.')
        )
    try:
        return Entry(index, said.id, from_base64(said.image, "image"), said.frame)
    except InvalidRequest as exc:
        return Entry(index, said.id, exc)


class _Parts:
    """Collects the parts of a form as its parser meets them."""

    def __init__(self, share: Share) -> None:
        self.complete: list[Entry] = []
        self.begun = self.ended = False
        self._count = 0
        self._header, self._value, self._disposition = bytearray(), bytearray(), b""
        self._part = _Unfinished(share, MAX_IMAGE, _too_large)

    @property
    def callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self.on_part_begin,
            "on_header_field": self.on_header_field,
            "on_header_value": self.on_header_value,
            "on_header_end": self.on_header_end,
            "on_part_data": self.on_part_data,
            "on_part_end": self.on_part_end,
            "on_end": self.on_end,
        }

    def on_part_begin(self) -> None:
        self._disposition = b""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self.begun = True
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self.begun = True
        self._part.add(data[start:end])

    def on_part_end(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"filename", options.get(b"name", b"")).decode(errors="replace")
        self.complete.append(Entry(self._count, name, self._part.refusal or bytes(self._part.data)))
        self._count += 1
        self.begun = False
        self._part.next_entry()

    def on_end(self) -> None:
        self.ended = True


async def read_parts(chunks: AsyncIterator[bytes], boundary: bytes, share: Share) -> AsyncIterator[Entry]:
    """The entries of a multipart body: every part is an image, and its file name (else its name) the id."""
    parts, arriving = _Parts(share), _Arriving(chunks)
    try:
        parser = MultipartParser(boundary, parts.callbacks)
        async for chunk in arriving:
            parser.write(chunk)
            if parts.complete:
                arriving.next_entry()
            for entry in parts.complete:
                yield entry
            parts.complete.clear()
            arriving.begun = parts.begun
    except FormParserError as exc:
        raise InvalidRequest(f"The body is no multipart form: {exc}.") from exc
    if not parts.ended:
        raise InvalidRequest("The multipart body ended before its closing boundary; send it again.")


def boundary_of(content_type: str) -> bytes:
    """The boundary that a multipart body's Content-Type names; raises InvalidRequest."""
    _, options = parse_options_header(content_type)
    if not (boundary := options.get(b"boundary")):
        raise InvalidRequest("The Content-Type of a multipart body must name its boundary.")
    return boundary
