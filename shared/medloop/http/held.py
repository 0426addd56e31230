"""What the bodies of all requests in progress may take together; touched by the event loop's thread only."""

from medloop.errors import Overloaded

SHARE = "medloop.share"
"""Where the guard puts the `Share` of a streamed request into the ASGI scope; whoever reads its body keeps count."""

BODIES = 8
"""Of the largest size allowed, fit into memory at a time."""


class Held:
    """Counts the bytes that are held, of bodies that may have `largest` each."""

    __slots__ = ("bytes", "largest", "limit")

    def __init__(self, largest: int) -> None:
        self.bytes, self.largest, self.limit = 0, largest, BODIES * largest


class Share:
    """What one request holds of it."""

    __slots__ = ("_held", "bytes")

    def __init__(self, held: Held) -> None:
        self._held, self.bytes = held, 0

    def add(self, size: int) -> Overloaded | None:
        """Count `size` bytes more; gives why they must be let go again where everybody's are too many. Who is alone is
        never refused for it."""
        self.bytes += size
        self._held.bytes += size
        if self._held.bytes > self._held.limit and self.bytes < self._held.bytes:
            return Overloaded("The bodies that are being sent fill the memory set aside; send this again later.")
        return None

    def remove(self, size: int) -> None:
        self.bytes -= size
        self._held.bytes -= size

    def end(self) -> None:
        """Nothing is held any more, whatever was not removed."""
        self.remove(self.bytes)

    @property
    def crowded(self) -> bool:
        """Whether others leave no room for one more body of the largest size."""
        return self._held.bytes - self.bytes > self._held.limit - self._held.largest
