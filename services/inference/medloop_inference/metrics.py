"""What inference tells Prometheus beside what every API does."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from medloop_inference.batcher import Released
from medloop_inference.champion import Watcher

Read: TypeAlias = tuple[str, str, Callable[[], float]]
"""A figure's name, what it is, and how to read it."""
DEGRADED = ("objects", "records", "tracking", "champion", "champion-refused", "engine", "start", "disk")
"""What can be degraded: each is told as 0 while it is not, so that an alert ends."""
_STAGE_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)  # seconds
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64)  # images


class Metrics:
    """Counts answers and refusals, and times stages and batches; called from the lanes' threads."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._predictions = Counter(
            "medloop_predictions", "Images answered, by model version", ["version", "decision"], registry=registry
        )
        self._refusals = Counter(
            "medloop_image_refusals", "Images refused, by the problem's code", ["code"], registry=registry
        )
        self._turned_away = Counter(
            "medloop_door_refusals",
            "Requests refused before their bodies were read, by the problem's code",
            ["code"],
            registry=registry,
        )
        stages = Histogram(
            "medloop_stage_seconds",
            "Seconds of an image in each stage; queue is the wait for the network",
            ["stage"],
            registry=registry,
            buckets=_STAGE_BUCKETS,
        )
        # Bound once: looking a label up costs as much as counting.
        self._stages = {stage: stages.labels(stage) for stage in ("decode", "queue", "network")}
        self._batches = Histogram(
            "medloop_batch_images", "Images of a batch", registry=registry, buckets=_BATCH_BUCKETS
        )
        released = Counter(
            "medloop_batches_released",
            "Batches, by why no image more was in them: full, or all that was ready",
            ["reason"],
            registry=registry,
        )
        self._released = {reason: released.labels(reason) for reason in ("full", "all-ready")}

    def stage(self, stage: str, seconds: float) -> None:
        self._stages[stage].observe(seconds)

    def batch(self, size: int, why: Released, seconds: float) -> None:
        self._batches.observe(size)
        self._released[why].inc()
        self._stages["network"].observe(seconds)

    def answered(self, version: str, decision: str) -> None:
        self._predictions.labels(version, decision).inc()

    def refused(self, code: str) -> None:
        """An image was."""
        self._refusals.labels(code).inc()

    def turned_away(self, code: str) -> None:
        """A request was, at the door."""
        self._turned_away.labels(code).inc()


class ServingState(Collector):
    """Read when Prometheus asks: which model answers, what is degraded, what waits, and what was never recorded."""

    def __init__(
        self,
        watcher: Watcher,
        degraded: Callable[[], Mapping[str, str]],
        gauges: Iterable[Read],
        counters: Iterable[Read],
    ) -> None:
        self._watcher, self._degraded = watcher, degraded
        self._gauges, self._counters = tuple(gauges), tuple(counters)

    def collect(self) -> Iterator[Metric]:
        labels = ["name", "version", "bundle_digest", "engine", "precision"]
        model = GaugeMetricFamily("medloop_model_info", "The model that answers", labels=labels)
        if (served := self._watcher.current) is not None:
            model.add_metric([getattr(served.ref, label) for label in labels], 1)
        yield model
        now = {*self._degraded(), *(["champion-refused"] if self._watcher.champion_refused else [])}
        degraded = GaugeMetricFamily("medloop_degraded", "1 for what is degraded or out of reach", labels=["what"])
        for what in sorted({*DEGRADED, *now}):
            degraded.add_metric([what], what in now)
        yield degraded
        for name, what, read in self._gauges:
            yield GaugeMetricFamily(name, what, value=read())
        for name, what, read in self._counters:
            yield CounterMetricFamily(name, what, value=read())
