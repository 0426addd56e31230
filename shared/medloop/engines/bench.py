"""What each engine would bring on this machine: speed, CPU and closeness, with turns taken so that all fare alike."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from medloop.bundle import Bundle, Pixels
from medloop.cpus import available_cpus
from medloop.engines import OFFERED, Network, open_network
from medloop.engines.checks import compare
from medloop.errors import InvalidRequest

BATCHES = (1, 8, 32)
_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Measurement:
    """One engine, precision, number of threads and batch size: images a second and CPU milliseconds an image, both
    the median over the rounds; milliseconds of a whole batch, the median and the 99th percentile of all runs; the
    largest |Δp| to the first engine on the golden inputs; seconds from file to network (an engine's first
    time with the import of its package)."""

    engine: str
    precision: str
    threads: int
    batch: int
    images_per_second: float
    cpu_ms: float
    p50_ms: float
    p99_ms: float
    max_difference: float
    load_seconds: float


@dataclass(slots=True)
class _Runs:
    """What one network did with one batch size."""

    rates: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)

    def round(self, network: Network, images: Pixels, seconds: float) -> None:
        begun, cpu, runs = time.perf_counter(), time.process_time(), 0
        ended = begun
        while ended - begun < seconds or not runs:
            started = ended
            network.run(images)
            ended, runs = time.perf_counter(), runs + 1
            self.latencies_ms.append(1000 * (ended - started))
        answered = runs * len(images)
        self.rates.append(answered / (ended - begun))
        self.cpu_ms.append(1000 * (time.process_time() - cpu) / answered)


def bench(
    bundle: Bundle, seconds: float, progress: Callable[[str, int, int], None]
) -> tuple[list[Measurement], dict[str, str]]:
    """Measure every engine and precision with one thread and with all, `seconds` each a batch size; and say of those
    that cannot run here why. float32 on ONNX Runtime comes first.

    Nothing else should run in this process: its CPU time would be counted, too.
    """
    networks, missing = _open(bundle)
    prepared = bundle.golden.prepared
    expected = networks[0][0].run(prepared).probabilities
    differences = [compare(expected, network.run(prepared).probabilities)[0] for network, _ in networks]
    found = []
    for done, batch in enumerate(BATCHES):
        progress("measure", done, len(BATCHES))
        images = np.resize(prepared, (batch, *prepared.shape[1:]))
        for network, _ in networks:
            network.run(images)  # lays out memory for this size
        runs = [_Runs() for _ in networks]
        for _ in range(_ROUNDS):
            for (network, _), its in zip(networks, runs, strict=True):
                its.round(network, images, seconds / _ROUNDS)
        found += [
            _summary(network, load, batch, its, difference)
            for (network, load), its, difference in zip(networks, runs, differences, strict=True)
        ]
    progress("measure", len(BATCHES), len(BATCHES))
    return sorted(found, key=lambda one: (OFFERED.index((one.engine, one.precision)), one.threads, one.batch)), missing


def _open(bundle: Bundle) -> tuple[list[tuple[Network, float]], dict[str, str]]:
    """The networks with the seconds each took to load, and why others are not there."""
    networks: list[tuple[Network, float]] = []
    missing: dict[str, str] = {}
    for engine, precision in OFFERED:
        for threads in sorted({1, available_cpus()}):
            try:
                started = time.perf_counter()
                network = open_network(bundle, engine, precision, threads)
                networks.append((network, time.perf_counter() - started))
            except InvalidRequest as exc:
                missing[f"{precision} on {engine}"] = exc.detail
    return networks, missing


def _summary(network: Network, load_seconds: float, batch: int, runs: _Runs, difference: float) -> Measurement:
    return Measurement(
        engine=network.engine,
        precision=network.precision,
        threads=network.threads,
        batch=batch,
        images_per_second=median(runs.rates),
        cpu_ms=median(runs.cpu_ms),
        p50_ms=float(np.percentile(runs.latencies_ms, 50)),
        p99_ms=float(np.percentile(runs.latencies_ms, 99)),
        max_difference=difference,
        load_seconds=load_seconds,
    )
