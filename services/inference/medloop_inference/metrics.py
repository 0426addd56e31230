"""What inference tells Prometheus beside what every API does."""

from collections.abc import Iterator

from medloop.schemas import Prediction
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from medloop_inference.champion import Watcher
from medloop_inference.recorder import Recorder

_STAGE_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)  # seconds


class Metrics:
    """Counts answers and refusals, and times the stages."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._predictions = Counter(
            "medloop_predictions", "Images answered, by model version", ["version"], registry=registry
        )
        self._refusals = Counter(
            "medloop_image_refusals", "Images refused, by the problem's code", ["code"], registry=registry
        )
        self._stages = Histogram(
            "medloop_stage_seconds", "Seconds by stage", ["stage"], registry=registry, buckets=_STAGE_BUCKETS
        )

    def observe(self, stage: str, seconds: float) -> None:
        self._stages.labels(stage).observe(seconds)

    def answered(self, prediction: Prediction) -> None:
        self._predictions.labels(prediction.model.version).inc()

    def refused(self, code: str) -> None:
        self._refusals.labels(code).inc()


class ServingState(Collector):
    """Read when Prometheus asks: which model answers, and how many predictions were never recorded."""

    def __init__(self, watcher: Watcher, recorder: Recorder) -> None:
        self._watcher, self._recorder = watcher, recorder

    def collect(self) -> Iterator[Metric]:
        labels = ["name", "version", "bundle_digest", "engine", "precision"]
        model = GaugeMetricFamily("medloop_model_info", "The model that answers", labels=labels)
        if (served := self._watcher.current) is not None:
            model.add_metric([getattr(served.ref, label) for label in labels], 1)
        yield model
        dropped = CounterMetricFamily("medloop_records_dropped", "Predictions that were never recorded")
        dropped.add_metric([], self._recorder.dropped)
        yield dropped
