"""Images out of a body that is still arriving, one after the other: lines of JSON, or the parts of a form.

Neither ever holds more than one image and what has arrived of the next. What is no image becomes an error in its place;
when the body itself is broken, reading ends with InvalidRequest.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final

from medloop.errors import ImageTooLarge, InvalidRequest, MedLoopError
from medloop.vision.decode import DEFAULT_LIMITS
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from medloop_inference.foreign import from_base64

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks  # a name for type checkers only

MAX_IMAGE: Final = DEFAULT_LIMITS.max_bytes
_MAX_LINE: Final = MAX_IMAGE * 4 // 3 + 4096  # base64, and the JSON around it

Name = Annotated[str, Field(max_length=4096)] | int | None


class Line(BaseModel):
    """One image of an NDJSON body: `id` comes back with its answer, `frame` is of a multi-frame DICOM, from 1."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    id: Name = None
    image: str
    frame: int | None = Field(default=None, ge=1)


@dataclass(frozen=True, slots=True)
class Entry:
    """The image at place `index` (from 0) of a stream, or why there is none."""

    index: int
    id: str | int | None
    image: bytes | MedLoopError
    frame: int | None = None


def _too_large() -> ImageTooLarge:
    return ImageTooLarge(f"The image file is larger than the {MAX_IMAGE / 2**20:.0f} MiB that are allowed.")


async def read_lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[Entry]:
    """The entries of an NDJSON body; blank lines count for nothing."""
    index, buffer, too_long = 0, bytearray(), False
    async for chunk in _ended(chunks):
        *complete, rest = chunk.split(b"\n")
        for piece in complete:
            buffer += piece
            if too_long or buffer.strip():
                yield _entry(index, _too_large() if too_long or len(buffer) > _MAX_LINE else bytes(buffer))
                index += 1
            buffer, too_long = bytearray(), False
        buffer += rest
        if len(buffer) > _MAX_LINE:
            buffer, too_long = bytearray(), True


async def _ended(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The last line may lack its end."""
    async for chunk in chunks:
        yield chunk
    yield b"\n"


def _entry(index: int, line: bytes | MedLoopError) -> Entry:
    if isinstance(line, MedLoopError):
        return Entry(index, None, line)
    try:
        parsed = Line.model_validate_json(line)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "the line"
        return Entry(
            index, None, InvalidRequest(f'Lines must be {{"id": …, "image": base64}}; {where}: {first["msg"]}.')
        )
    try:
        return Entry(index, parsed.id, from_base64(parsed.image, "image"), parsed.frame)
    except InvalidRequest as exc:
        return Entry(index, parsed.id, exc)


class _Parts:
    """Collects the parts of a form as its parser meets them."""

    def __init__(self) -> None:
        self.complete: list[Entry] = []
        self.ended = False
        self._count = 0
        self._header, self._value, self._disposition = bytearray(), bytearray(), b""
        self._data, self._too_large = bytearray(), False

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
        self._disposition, self._data, self._too_large = b"", bytearray(), False

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if len(self._data) + end - start > MAX_IMAGE:
            self._too_large = True
        elif not self._too_large:
            self._data += data[start:end]

    def on_part_end(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"filename", options.get(b"name", b"")).decode(errors="replace")
        self.complete.append(Entry(self._count, name, _too_large() if self._too_large else bytes(self._data)))
        self._count += 1

    def on_end(self) -> None:
        self.ended = True


async def read_parts(chunks: AsyncIterator[bytes], boundary: bytes) -> AsyncIterator[Entry]:
    """The entries of a multipart body: every part is an image, and its file name (else its name) the id."""
    parts = _Parts()
    try:
        parser = MultipartParser(boundary, parts.callbacks)
        async for chunk in chunks:
            parser.write(chunk)
            for entry in parts.complete:
                yield entry
            parts.complete.clear()
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
