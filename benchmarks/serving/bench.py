"""The bench that every part works at: networks, images, known answers, an MLflow, and servers started on demand."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

import numpy as np
from medloop.bundle import read_bundle
from medloop.testing import free_port

from benchmarks.serving import floor, load, models
from benchmarks.serving.loop import Registrar, check_engine, mlflow_server, prepare_home
from benchmarks.serving.process import ROOT, Memory, Server
from benchmarks.serving.servers import KINDS, LOWER, LOWER_ENGINE, OURS, Kind, Place

WARM_S = 1.0
MODELS = ("tiny64", "resnet18_224")
"""What CPU and memory are compared with."""
NOTHING: Mapping[str, str] = {}

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of one server: CPU-milliseconds a request over its process tree, wall-clock milliseconds,
    requests a second, its memory afterwards, and the share of a core that the load generator took."""

    cpu_ms: float
    p50_ms: float
    p99_ms: float
    rate: float
    memory: Memory
    generator: float


class Bench:
    """Everything is made when it is first needed, under `folder`; what lies there from before is used again."""

    def __init__(self, folder: Path, threads: int, models: Sequence[str] = MODELS) -> None:
        self.folder, self.threads, self.compared = folder, threads, models
        self._open = ExitStack()
        self._compared: dict[tuple[str, str], float] = {}
        self._homes: dict[str, tuple[Path, Registrar, str]] = {}
        self._scratches = 0

    def __enter__(self) -> Self:
        # The load generator's process, spawned: forked, it would carry this one's memory along.
        self._worker = self._open.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def apart(self, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Run `function` in the load generator's process."""
        return self._worker.submit(function, *args, **kwargs).result()

    def fresh(self, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Run `function` in a new process, so that it starts from nothing and leaves nothing."""
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as worker:
            return worker.submit(function, *args, **kwargs).result()

    @cached_property
    def tracking_uri(self) -> str:
        return self._open.enter_context(mlflow_server(self.scratch("mlflow")))

    def scratch(self, name: str) -> Path:
        """A new folder of this run."""
        self._scratches += 1
        folder = self.folder / "run" / f"{self._scratches:03d}-{name}"
        folder.mkdir(parents=True)
        return folder

    def model(self, name: str) -> Path:
        folder = self.folder / "models" / name
        if not folder.exists():
            command = [sys.executable, "-m", "benchmarks.serving.models", str(folder.parent), name]
            subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        return folder

    def home(self, name: str) -> tuple[Path, Registrar, str]:
        """A home whose champion is the model, who approves its versions, and the first one's number."""
        if name not in self._homes:
            home = self.scratch(f"home-{name}") / ".medloop"
            self._homes[name] = (home, *prepare_home(home, self.model(name) / "bundle", self.tracking_uri))
        return self._homes[name]

    def server(
        self, kind: Kind, name: str, port: int, variables: Mapping[str, str] = NOTHING, home: Path | None = None
    ) -> Server:
        """The server with the model, not started yet. Ours has the model's home, unless another one is given."""
        ours = kind.ours
        scratch = self.scratch(f"{kind.name}-{name}")
        place = Place(
            model=self.model(name),
            scratch=scratch,
            port=port,
            threads=self.threads,
            home=home or (self.home(name)[0] if ours else scratch),
            tracking_uri=self.tracking_uri if ours else "",
        )
        # Torch's threads would otherwise spin between two operations, and measure the load generator's company.
        openmp = {"OMP_NUM_THREADS": str(self.threads), "OMP_WAIT_POLICY": "PASSIVE"}
        if kind.name == LOWER:
            bundle, version = read_bundle(place.model / "bundle"), self.home(name)[2]
            check_engine(place.home, bundle, version, [image for image, _ in models.files(name)], *LOWER_ENGINE)
        environment = {**openmp, **kind.variables(place), **variables}
        return Server(kind.command(place), environment, scratch / "server.log")

    @contextmanager
    def running(self, kind: Kind, name: str, variables: Mapping[str, str] = NOTHING) -> Iterator["Running"]:
        """The server with the model, answering; compared with the bare engine the first time."""
        port = free_port()
        with self.server(kind, name, port, variables) as server:
            found = Running(self, kind, name, server, port)
            server.wait_ready(found.answers)
            if (kind.name, name) not in self._compared:
                self._compared[kind.name, name] = found.compare()
            server.settle()
            yield found

    @property
    def differences(self) -> dict[str, float]:
        return {f"difference.{name}.{kind}": value for (kind, name), value in self._compared.items()}

    def expected(self, name: str) -> list[list[float]]:
        file = self.folder / "models" / f"{name}.answers.json"
        if not file.exists():
            images = [image for image, _ in models.files(name)]
            file.write_text(json.dumps(self.fresh(floor.probabilities, self.model(name) / "bundle", images)))
        found: list[list[float]] = json.loads(file.read_text())
        return found


class Running:
    """A server that answers."""

    def __init__(self, bench: Bench, kind: Kind, name: str, server: Server, port: int) -> None:
        self._bench, self.kind, self.name, self.server, self.port = bench, kind, name, server, port
        self.requests = [kind.request(*image) for image in models.files(name)]

    def answers(self) -> bool:
        """Whether a first request is answered with 200."""
        try:
            return self._bench.apart(load.closed_loop, self.port, self.requests[:1], 1).statuses == [200]
        except OSError:
            return False

    def compare(self) -> float:
        """The largest |Δp| between its answers and the bare engine's; raises RuntimeError where they are others."""
        outcome = self._bench.apart(load.closed_loop, self.port, self.requests, 4, keep=True)
        self._check(outcome)
        expected = self._bench.expected(self.name)
        pairs = zip(outcome.indices, outcome.bodies, strict=True)
        found = [(self.kind.probabilities(json.loads(body)), expected[index]) for index, body in pairs]
        difference = max(float(np.abs(np.subtract(ours, known)).max()) for ours, known in found)
        if not difference <= self.kind.max_difference:
            raise RuntimeError(f"{self.kind.name} answers otherwise than the bare engine: |Δp| = {difference:.1e}")
        return difference

    def press(self, clients: int, seconds: float) -> load.Outcome:
        return self._bench.apart(load.closed_loop, self.port, self.requests, clients, seconds)

    def measure(self, clients: int, seconds: float, warm: float = WARM_S) -> Sample:
        """Warm up, then measure under `clients` closed-loop clients; raises RuntimeError unless all got 200."""
        self.press(clients, warm)
        before = self.server.cpu_seconds()
        outcome = self.press(clients, seconds)
        cpu = self.server.cpu_seconds() - before
        self._check(outcome)
        answered = len(outcome.latencies)
        p50, p99 = percentiles(outcome.latencies)
        return Sample(
            cpu_ms=1000 * cpu / answered,
            p50_ms=p50,
            p99_ms=p99,
            rate=answered / outcome.wall_s,
            memory=self.server.memory(),
            generator=outcome.cpu_s / outcome.wall_s,
        )

    def _check(self, outcome: load.Outcome) -> None:
        statuses = sorted(set(outcome.statuses))
        if outcome.failed or statuses != [200]:
            raise RuntimeError(f"{self.kind.name} answered with {statuses}, and {outcome.failed} times not at all")


def percentiles(latencies: Sequence[float]) -> tuple[float, float]:
    """Median and 99th percentile in milliseconds of latencies in seconds."""
    p50, p99 = np.percentile(latencies, [50, 99]) * 1000
    return float(p50), float(p99)


def chosen(peers: Sequence[str]) -> list[Kind]:
    """Ours and those peers that are installed."""
    return [KINDS[OURS], *(KINDS[name] for name in peers if KINDS[name].installed)]
