"""Servers as processes: started, waited for, measured as a whole tree, and ended with everything they left behind."""

import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

_MARK = "MEDLOOP_BENCHMARK_TREE"
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_STOP_S = 20.0
ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a tree: `rss` counts a page shared by two of its processes twice, `pss` once."""

    rss: int
    pss: int


class Server:
    """A command and all processes that come of it.

    They are found as its descendants, and by a mark in their environment where they left the tree (Ray's do). Use as a
    context: at its end all of them are told to stop, then killed. `log` gets what they print.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._mark = secrets.token_hex(16)
        self._log = log
        self._command = [*command]
        self._environment = {**os.environ, **environment, _MARK: self._mark}
        self._known: dict[int, str] = {}  # pid → start time, since pids come again
        self.started = 0.0

    def __enter__(self) -> Self:
        self.started = time.perf_counter()
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait_ready(self, probe: Callable[[], bool], timeout: float = 120.0, interval: float = 0.02) -> float:
        """Seconds from the start until `probe` holds; raises RuntimeError with the end of the log if it never does."""
        while not probe():
            if self._process.poll() is not None:
                raise RuntimeError(f"{self._command[:4]} ended early:\n{self._tail()}")
            if time.perf_counter() - self.started > timeout:
                raise RuntimeError(f"{self._command[:4]} is not ready after {timeout:.0f} s:\n{self._tail()}")
            time.sleep(interval)
        return time.perf_counter() - self.started

    def settle(self, share: float = 0.1, window: float = 0.5, timeout: float = 15.0) -> None:
        """Return once the tree takes less than `share` of a processor, or after `timeout` seconds: what is still being
        imported or compiled after a server says it is ready is not the cost of a request."""
        until = time.perf_counter() + timeout
        while time.perf_counter() < until:
            before = self.cpu_seconds()
            time.sleep(window)
            if self.cpu_seconds() - before < share * window:
                return

    def cpu_seconds(self) -> float:
        """User and system time of the tree so far; what has ended counts with the parent that waited for it."""
        return sum(sum(map(int, fields[11:15])) for fields in map(_stat, self.pids()) if fields) / _TICKS

    def memory(self) -> Memory:
        rss = pss = 0
        for pid in self.pids():
            fields = _stat(pid)
            rss += int(fields[21]) * _PAGE if fields else 0
            pss += _pss(pid)
        return Memory(rss, pss)

    def pids(self) -> list[int]:
        """The living processes of the tree."""
        parents: dict[int, int] = {}
        starts: dict[int, str] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and (fields := _stat(int(entry.name))):
                parents[int(entry.name)], starts[int(entry.name)] = int(fields[1]), fields[19]
        found = {pid for pid, start in self._known.items() if starts.get(pid) == start}
        found |= {self._process.pid} & parents.keys()
        found |= {pid for pid in parents if pid not in found and self._marked(pid)}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        self._known = {pid: starts[pid] for pid in found}
        return sorted(found)

    def terminate(self) -> None:
        """Ask the first process to stop, as an orchestrator does."""
        self._process.terminate()

    def wait(self, timeout: float = _STOP_S) -> int:
        return self._process.wait(timeout)

    def stop(self) -> None:
        """Stop the first process, then whatever is left of its tree."""
        self.pids()
        if self._process.poll() is None:
            self._process.terminate()
        deadline = time.perf_counter() + _STOP_S
        while self.pids() and time.perf_counter() < deadline:
            if self._process.poll() is not None:  # reaps it, too
                deadline = min(deadline, time.perf_counter() + 2.0)
            time.sleep(0.05)
        while left := self.pids():
            for pid in left:
                _kill(pid)
            self._process.poll()
            time.sleep(0.01)
        self._process.wait()

    def _marked(self, pid: int) -> bool:
        try:
            return f"{_MARK}={self._mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:  # ended meanwhile, or another user's
            return False

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on (proc(5) calls it the third); empty for a process that ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    fields = text.rpartition(")")[2].split()  # a name may hold anything, even brackets
    return fields if fields[0] not in "ZX" else []


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # ended meanwhile
