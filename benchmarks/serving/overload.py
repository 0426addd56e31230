"""Ten times more than the server can do: what it still gets done, and how it refuses the rest."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from benchmarks.serving import load
from benchmarks.serving.bench import WARM_S, Bench, Running
from benchmarks.serving.servers import KINDS, OURS, Kind

MODEL = "resnet18_224"
TIMES = 10
TARGET_MS = 1000.0
CLIENTS = (4, 8, 16)
"""The saturating rate is the best of these closed loops."""
SECONDS_A_SECOND = 6
"""The overload lasts this many times as long as another measurement: 30 s by default."""


def compare(bench: Bench, kinds: Sequence[Kind], repeats: int, seconds: float) -> dict[str, float]:
    with bench.running(KINDS[OURS], MODEL, {"MEDLOOP_TARGET_MS": str(TARGET_MS)}) as server:
        peak = max(_accepted_rate(server, clients, seconds) for clients in CLIENTS)
        before = server.server.memory().rss
        with _highest_memory(server) as highest:
            outcome = bench.apart(
                load.open_loop, server.port, server.requests, TIMES * peak, SECONDS_A_SECOND * seconds
            )
    return figures(outcome, peak) | {"overload.rss_growth": max(highest) / before - 1}


def _accepted_rate(server: Running, clients: int, seconds: float) -> float:
    server.press(clients, WARM_S)
    outcome = server.press(clients, seconds)  # a slow machine may refuse some of these already
    return outcome.statuses.count(200) / outcome.wall_s


def figures(outcome: load.Outcome, peak: float) -> dict[str, float]:
    statuses = np.array(outcome.statuses, dtype=int)
    milliseconds = np.array(outcome.latencies) * 1000
    accepted, refused = milliseconds[statuses == 200], milliseconds[statuses == 429]
    good = int((accepted <= TARGET_MS).sum())
    return {
        "overload.peak_per_second": peak,
        "overload.offered_per_second": (len(statuses) + outcome.failed + outcome.unsent) / outcome.wall_s,
        "overload.goodput_of_peak": good / outcome.wall_s / peak,
        "overload.target_ms": TARGET_MS,
        "overload.accepted_p99_ms": _p99(accepted),
        "overload.refusal_p99_ms": _p99(refused),
        "overload.accepted": len(accepted),
        "overload.refused": len(refused),
        "overload.other_statuses": len(statuses) - len(accepted) - len(refused),
        "overload.failed": outcome.failed,
        "overload.unsent": outcome.unsent,
        "overload.generator_cores": outcome.cpu_s / outcome.wall_s,
    }


def _p99(milliseconds: "np.typing.NDArray[np.float64]") -> float:
    return float(np.percentile(milliseconds, 99)) if len(milliseconds) else float("nan")


@contextmanager
def _highest_memory(server: Running) -> Iterator[list[int]]:
    """Resident bytes, looked at every second while the block runs, and at its end."""
    found: list[int] = []
    done = threading.Event()

    def look() -> None:
        while not done.wait(1.0):
            found.append(server.server.memory().rss)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found.append(server.server.memory().rss)
