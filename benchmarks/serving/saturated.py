"""How near the server comes to what the machine could do at most: decoding and the bare engine, with nothing around."""

from collections.abc import Sequence
from statistics import median

from benchmarks.serving import floor
from benchmarks.serving.bench import Bench
from benchmarks.serving.models import files
from benchmarks.serving.servers import KINDS, OURS, Kind

MODEL = "resnet18_64"
CLIENTS = 32
BATCHES = (8, 16, 32)
"""What the bare engine may take together; its cheapest counts."""


def compare(bench: Bench, kinds: Sequence[Kind], repeats: int, seconds: float) -> dict[str, float]:
    bundle, images = bench.model(MODEL) / "bundle", [image for image, _ in files(MODEL)]
    ours: list[float] = []
    limits: list[float] = []
    for _ in range(repeats):
        engine = min(bench.fresh(floor.bare_engine, bundle, images, bench.threads, batch) for batch in BATCHES)
        limits.append(engine + bench.fresh(floor.decoding, bundle, images))
        with bench.running(KINDS[OURS], MODEL) as server:
            ours.append(server.measure(CLIENTS, seconds).cpu_ms)
    place = f"{MODEL}.c{CLIENTS}"
    return {
        f"cpu_ms.{place}.{OURS}": median(ours),
        f"cpu_ms.{place}.limit": median(limits),
        "throughput_of_limit": median(limit / found for limit, found in zip(limits, ours, strict=True)),
    }
