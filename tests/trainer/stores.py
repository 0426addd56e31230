"""Object stores in memory that fail as real ones do: gone for a while, or with the whole process."""

from collections.abc import Iterator

from medloop.errors import NotFound, StorageUnavailable


class Killed(BaseException):
    """The process is gone."""


class MemoryObjects:
    """An `ObjectStore` in a dictionary. `away` makes every verb raise StorageUnavailable."""

    url = "memory:"

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.away = False
        self.writes = 0

    def put(self, key: str, data: bytes, *, durable: bool = True) -> None:
        self._change()
        self.content[key] = data
        self._changed()

    def put_if_absent(self, key: str, data: bytes, *, durable: bool = True) -> bool:
        if key in self.content:
            return False
        self.put(key, data)
        return True

    def delete(self, key: str) -> None:
        self._change()
        self.content.pop(key, None)
        self._changed()

    def get(self, key: str, *, at_most: int | None = None) -> bytes:
        self._look()
        if key not in self.content:
            raise NotFound(f"There is no object {key}.")
        return self.content[key]

    def exists(self, key: str) -> bool:
        self._look()
        return key in self.content

    def list(self, prefix: str = "") -> Iterator[str]:
        self._look()
        return iter(sorted(key for key in self.content if key.startswith(prefix)))

    def ping(self) -> None:
        self._look()

    def _look(self) -> None:
        if self.away:
            raise StorageUnavailable("The store is away.")

    def _change(self) -> None:
        self._look()

    def _changed(self) -> None:
        self.writes += 1


class DyingObjects(MemoryObjects):
    """With `die(n)` the process is killed at the n-th write or removal from now, right before or right after it takes
    effect, and nothing works any more until `revive`."""

    def __init__(self) -> None:
        super().__init__()
        self._left: int | None = None
        self._after = False
        self.dead = False

    def die(self, writes: int, *, after: bool) -> None:
        self._left, self._after = writes, after

    def revive(self) -> None:
        self._left, self.dead = None, False

    def _look(self) -> None:
        if self.dead:
            raise Killed
        super()._look()

    def _change(self) -> None:
        super()._change()
        if self._left is not None:
            self._left -= 1
            if self._left == 0 and not self._after:
                self._kill()

    def _changed(self) -> None:
        super()._changed()
        if self._left == 0:
            self._kill()

    def _kill(self) -> None:
        self.dead = True
        raise Killed
