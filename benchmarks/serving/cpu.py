"""CPU a request and latency, ours beside every peer, in rounds in which each has its turn."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from benchmarks.serving import floor
from benchmarks.serving.bench import Bench, Sample
from benchmarks.serving.models import files
from benchmarks.serving.servers import LOWER, OURS, Kind

CLIENTS = (1, 16)

Round = Mapping[tuple[str, int], Sample]
"""What one round measured, by (server, clients)."""


def compare(bench: Bench, kinds: Sequence[Kind], repeats: int, seconds: float) -> dict[str, float]:
    figures: dict[str, float] = {}
    for model in bench.compared:
        rounds: list[Round] = []
        floors: list[dict[int, float]] = []
        for number in range(repeats):
            # Another first one each time: what a machine does in the first minute is nobody's advantage.
            turn = number % len(kinds)
            rounds.append(_round(bench, [*kinds[turn:], *kinds[:turn]], model, seconds))
            floors.append({clients: _floor(bench, model, clients) for clients in CLIENTS})
        for clients in CLIENTS:
            figures |= _figures(rounds, model, clients, [kind.name for kind in kinds])
            ours = [r[OURS, clients].cpu_ms for r in rounds]
            figures |= _against_floor(ours, [f[clients] for f in floors], f"{model}.c{clients}")
    return figures | bench.differences


def _round(bench: Bench, kinds: Iterable[Kind], model: str, seconds: float) -> Round:
    found: dict[tuple[str, int], Sample] = {}
    for kind in kinds:
        with bench.running(kind, model) as server:
            for clients in CLIENTS:
                found[kind.name, clients] = server.measure(clients, seconds)
    return found


def _floor(bench: Bench, model: str, clients: int) -> float:
    """CPU-milliseconds of the bare engine and of decoding; the engine may take the clients' images together."""
    bundle, images = bench.model(model) / "bundle", [image for image, _ in files(model)]
    return bench.fresh(floor.bare_engine, bundle, images, bench.threads, clients) + bench.fresh(
        floor.decoding, bundle, images
    )


def _figures(rounds: Sequence[Round], model: str, clients: int, names: Sequence[str]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name in names:
        samples = [r[name, clients] for r in rounds]
        place = f"{model}.c{clients}.{name}"
        figures[f"cpu_ms.{place}"] = median(sample.cpu_ms for sample in samples)
        figures[f"p50_ms.{place}"] = median(sample.p50_ms for sample in samples)
        figures[f"p99_ms.{place}"] = median(sample.p99_ms for sample in samples)
        figures[f"requests_per_second.{place}"] = median(sample.rate for sample in samples)
        figures[f"generator_cores.{place}"] = median(sample.generator for sample in samples)
        if name != OURS:
            pairs = [(r[OURS, clients], r[name, clients]) for r in rounds]
            figures[f"cpu_ratio.{place}"] = median(ours.cpu_ms / theirs.cpu_ms for ours, theirs in pairs)
            figures[f"p50_ratio.{place}"] = median(ours.p50_ms / theirs.p50_ms for ours, theirs in pairs)
            if LOWER in names and name != LOWER:
                figures[f"bfloat16_ratio.{place}"] = median(
                    r[LOWER, clients].cpu_ms / r[name, clients].cpu_ms for r in rounds
                )
    return figures


def _against_floor(ours: Sequence[float], floors: Sequence[float], place: str) -> dict[str, float]:
    ratios = [a / b for a, b in zip(ours, floors, strict=True)]
    return {f"cpu_ms.{place}.floor": median(floors), f"cpu_ratio.{place}.floor": median(ratios)}
