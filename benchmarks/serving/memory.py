"""Memory under load beside every peer, and how soon our server answers after its start."""

from collections.abc import Mapping, Sequence
from statistics import median

from medloop.testing import free_port

from benchmarks.serving.bench import NOTHING, Bench
from benchmarks.serving.loop import answers
from benchmarks.serving.process import Memory
from benchmarks.serving.servers import KINDS, OURS, Kind

CLIENTS = 16


def compare(bench: Bench, kinds: Sequence[Kind], repeats: int, seconds: float) -> dict[str, float]:
    figures: dict[str, float] = {}
    for model in bench.compared:
        found = {kind.name: _memory(bench, kind, model, seconds) for kind in kinds}
        for name, memory in found.items():
            figures[f"rss_mib.{model}.{name}"] = memory.rss / 2**20
            figures[f"pss_mib.{model}.{name}"] = memory.pss / 2**20
            if name != OURS:
                # Theirs without what their processes share, ours with everything: where they differ, never for us.
                figures[f"rss_ratio.{model}.{name}"] = found[OURS].rss / memory.pss
    return figures | ready_seconds(bench, repeats)


def _memory(bench: Bench, kind: Kind, model: str, seconds: float) -> Memory:
    with bench.running(kind, model) as server:
        return server.measure(CLIENTS, seconds).memory


def ready_seconds(bench: Bench, repeats: int) -> dict[str, float]:
    """Seconds from the start of the process to a ready `/readyz`, with the model in the disk cache."""
    model = bench.compared[-1]
    nowhere = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}"}
    with bench.running(KINDS[OURS], model):
        pass  # whatever is not cached yet, now is
    return {
        "ready_seconds": median(_ready(bench, model) for _ in range(repeats)),
        "ready_seconds_without_mlflow": median(_ready(bench, model, nowhere) for _ in range(repeats)),
    }


def _ready(bench: Bench, model: str, variables: Mapping[str, str] = NOTHING) -> float:
    port = free_port()
    with bench.server(KINDS[OURS], model, port, variables) as server:
        return server.wait_ready(lambda: answers(f"127.0.0.1:{port}", "/readyz"))
