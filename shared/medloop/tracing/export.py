"""How spans leave the process: in a thread of their own, dropped rather than waited for.

Told once when they do not arrive, and once when they do again, where OpenTelemetry says it at every try.
"""

import logging
import threading
from collections.abc import Sequence

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

logger = logging.getLogger(__name__)

_EXPORTER_LOG = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
_QUEUE_LOG = "opentelemetry.sdk._shared_internal"


class Delivery(SpanExporter):
    """Hands batches to `exporter`, which sends them `to` some address; called from the processor's thread."""

    def __init__(self, exporter: SpanExporter, to: str) -> None:
        self._exporter, self._to = exporter, to
        self._lock = threading.Lock()
        self._closed = False
        self._sending = 0
        self.failing = False
        logging.getLogger(_EXPORTER_LOG).addFilter(self._hear_exporter)
        logging.getLogger(_QUEUE_LOG).addFilter(self._hear_queue)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        if self._closed:
            return SpanExportResult.FAILURE
        self._sending = threading.get_ident()
        result = self._exporter.export(spans)
        self._sending = 0
        if result is not SpanExportResult.SUCCESS:
            self._failed("they were not accepted")
        elif self.failing:
            self.failing = False
            logger.info("traces arrive at %s again", self._to)
        return result

    def shutdown(self) -> None:
        """End waiting for another try; what comes from now on is dropped. Asked twice, it does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)

    def forget(self) -> None:
        """OpenTelemetry may speak for itself again."""
        logging.getLogger(_EXPORTER_LOG).removeFilter(self._hear_exporter)
        logging.getLogger(_QUEUE_LOG).removeFilter(self._hear_queue)

    def _failed(self, why: str) -> None:
        if not self.failing and not self._closed:
            self.failing = True
            logger.warning("traces do not arrive at %s and are dropped until they do: %s", self._to, why)

    def _hear_exporter(self, record: logging.LogRecord) -> bool:
        """What the exporter would tell at each try: the first is told in our own words, the others not at all.

        The log is the whole process's and the thread says whose exporter it is: another app may send elsewhere.
        """
        if record.thread != self._sending:
            return True
        if record.levelno >= logging.WARNING:
            self._failed(record.getMessage())
        return False

    def _hear_queue(self, record: logging.LogRecord) -> bool:
        """A full queue is news only while the collector answers."""
        return not self.failing
