"""HTTP/1.1 as a load generator needs it: requests that lie ready as bytes, answers read with as little work as can be.

Every cycle spent here is taken from the server under test, which shares the cores.
"""

import socket
from dataclasses import dataclass

_READ_BYTES = 1 << 16
_END_OF_HEAD = b"\r\n\r\n"
_CHUNKED_END = b"0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Answer:
    """One response. `closes` is whether the server ends the connection after it."""

    status: int
    body: bytes
    closes: bool


def request_bytes(path: str, body: bytes, content_type: str, headers: tuple[str, ...] = ()) -> bytes:
    """A POST as it goes over the wire; servers on loopback need no name."""
    head = (
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(body)}",
        *headers,
    )
    return "\r\n".join(head).encode() + _END_OF_HEAD + body


def multipart(field: str, filename: str, content: bytes, content_type: str) -> tuple[bytes, str]:
    """A form of one file: (body, content type)."""
    boundary = "medloop-benchmark-boundary"
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"; filename="{filename}"\r\n'
        f"Content-Type: {content_type}\r\n\r\n"
    )
    return head.encode() + content + f"\r\n--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


class Connection:
    """One keep-alive connection that carries one exchange at a time, without blocking.

    `fileno` makes it fit for a selector. Errors of the socket come through as OSError; an answer that ends too early
    as ConnectionError.
    """

    def __init__(self, port: int) -> None:
        self._socket = socket.socket()
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.connect_ex(("127.0.0.1", port))
        self._out = memoryview(b"")
        self._in = b""
        self._complete_at = -1  # bytes of head and body together, once the head is read

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    @property
    def sending(self) -> bool:
        """Whether part of the request is still here: a server may answer, and refuse, before it has read all."""
        return bool(self._out)

    def begin(self, request: bytes) -> bool:
        """Start sending; returns whether all of it is out, else call `push` when the socket can take more."""
        self._out = memoryview(request)
        self._in, self._complete_at = b"", -1
        return self.push()

    def push(self) -> bool:
        try:
            while self._out:
                self._out = self._out[self._socket.send(self._out) :]
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            self._out = memoryview(b"")  # reading tells the same, with what the server may have said before
        return True

    def pull(self) -> Answer | None:
        """Read what has come; the answer once it is whole."""
        try:
            data = self._socket.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return None
        if not data:
            raise ConnectionError("the server closed the connection before its answer was whole")
        self._in = self._in + data if self._in else data
        return self._answer()

    def _answer(self) -> Answer | None:
        end = self._in.find(_END_OF_HEAD)
        if end < 0:
            return None
        head = self._in[:end].lower()
        length = head.find(b"content-length:")
        if length >= 0:
            stop = head.find(b"\r", length)
            size = int(head[length + 15 : stop if stop >= 0 else len(head)])
            if len(self._in) < end + 4 + size:
                return None
            body = self._in[end + 4 : end + 4 + size]
        elif b"transfer-encoding: chunked" in head:
            if not self._in.endswith(_CHUNKED_END):
                return None
            body = _unchunk(self._in[end + 4 :])
        else:
            raise ConnectionError("the answer names no length")
        return Answer(int(head[9:12]), body, b"connection: close" in head)


def _unchunk(data: bytes) -> bytes:
    pieces: list[bytes] = []
    while data:
        size, _, data = data.partition(b"\r\n")
        length = int(size.partition(b";")[0], 16)
        if length == 0:
            break
        pieces.append(data[:length])
        data = data[length + 2 :]
    return b"".join(pieces)
