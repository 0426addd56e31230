"""The parts of one running inference service, and how they are tied together."""

import logging
import time

from medloop import tracing
from medloop.cpus import available_cpus
from medloop.engines import check_offered
from medloop.engines.checks import find_check
from medloop.errors import MedLoopError, Overloaded
from medloop.http import STOP_SECONDS, Readiness
from medloop.registry import Registry
from medloop.schemas import Correction, EngineCheck, Prediction, ServedModel
from medloop.storage.objects import ObjectStore, open_objects
from medloop.storage.records import RecordStore, open_records
from medloop.vision.dicom import is_dicom
from medloop.vision.dicom_reader import DicomReader
from prometheus_client import CollectorRegistry, ProcessCollector
from pydantic import ValidationError

from medloop_inference.admission import Pace
from medloop_inference.answer import record_of
from medloop_inference.background import Neighbours, Periodic
from medloop_inference.batcher import Settled
from medloop_inference.champion import Watcher
from medloop_inference.corrections import Corrections, Submission
from medloop_inference.delivery import Entry
from medloop_inference.handover import Collector, Handover
from medloop_inference.loading import Wanted
from medloop_inference.metrics import Metrics, Read, ServingState
from medloop_inference.predict import Predictor
from medloop_inference.records import Recorder
from medloop_inference.settings import Settings
from medloop_inference.shadow import Shadow
from medloop_inference.spool import Spool
from medloop_inference.traced import TracedPredictor
from medloop_inference.turns import Turns

CORRECTING = 2
"""Corrections that are decoded and stored at once: they must not take the processor from predictions."""
MOST_CORRECTIONS = 8
"""That may wait to be decoded and stored, each with an image in memory."""
ANSWER_SECONDS = 5.0
"""How long a correction or a listing may take beside the way of an image into objects: its turn, decoding, records."""
DICOM_SECONDS = 10.0
"""How long a correction may wait for the process that reads DICOM, a person would rather wait than send it again; and
how long that may read."""
READING, MOST_LISTINGS = 4, 64
"""Listings that are read from records at once, and that may wait: slow records must not take the threads that others
need."""
logger = logging.getLogger(__name__)

RECORDING_SECONDS = 3.0
"""What the recorder has in any case to deliver what waits, of the time in which the service must have stopped."""
PART_SECONDS = 2.0
"""How long one of the other parts is waited for: it may hang on a neighbour, and loses little."""
NEIGHBOUR_SECONDS = 10.0
"""Between two looks at whether objects and records answer."""
COLLECT_SECONDS = 60.0
"""Between two looks for what ended replicas left in objects: nobody waits for it, and each look is paid for."""


class Service:
    """Everything is made here and started by `start`; `stop` ends it in the order in which nothing is lost.

    Raises InvalidRequest for settings that no version could be served with.
    """

    def __init__(self, settings: Settings, readiness: Readiness, metrics: CollectorRegistry) -> None:
        self._readiness = readiness
        model, recording = settings.serving.model, settings.recording
        check_offered(settings.engine.engine, settings.engine.precision)
        registry = Registry(settings.tracking.tracking_uri)
        self.objects: ObjectStore = open_objects(settings.storage.objects_url)
        prompt_objects = open_objects(settings.storage.objects_url, within=settings.storage.objects_seconds)
        self.records: RecordStore = open_records(settings.storage.records_url)
        self.watcher = Watcher(
            model,
            registry,
            settings.home,
            wanted=self._wanted(settings),
            report=lambda reason: readiness.passed() if reason is None else readiness.failed(reason),
        )
        self.metrics = Metrics(metrics)
        spool_dir = recording.spool_dir or settings.home.home / "inference" / model / "spool"
        self.spool = Spool(spool_dir, recording.spool_max_bytes)
        # Only where replicas share both stores: a folder ends with this disk as the spool does, and what one replica
        # collects into a file of its own would be missing to all others.
        storage = settings.storage
        apart = storage.objects_url.startswith("s3://") and not storage.records_url.startswith("sqlite:")
        self.recorder = Recorder(
            self.records, self.objects, self.spool, handover=Handover(self.objects) if apart else None
        )
        self.collector = Collector(self.records, self.objects, stopping=lambda: readiness.draining)
        self.dicom = DicomReader()
        cpus = available_cpus()
        predictor = TracedPredictor if tracing.wanted() else Predictor
        self.predictor = predictor(
            self.watcher.served,
            settings.queue,
            lanes=cpus,
            runs=max(1, cpus // (settings.engine.engine_threads or 1)),
            dicom=self.dicom,
            watch=self.metrics,
            sink=self,
            stored=recording.store_images,
        )
        self.shadow: Shadow | None = None
        if share := settings.serving.shadow_share:
            busy = lambda: self.predictor.busy  # noqa: E731 - one line says it all
            self.shadow = Shadow(model, registry, settings.home, self.records, share=share, busy=busy)
        self.correcting = Turns("corrections", CORRECTING, MOST_CORRECTIONS)
        self.reading = Turns("listings", READING, MOST_LISTINGS)
        self.answer_seconds = settings.storage.objects_seconds + ANSWER_SECONDS
        self.correction_dicom = DicomReader(seconds=DICOM_SECONDS, wait_seconds=DICOM_SECONDS)
        self.corrections = Corrections(model, prompt_objects, self.records, self.correction_dicom)
        self.neighbours = Neighbours({"objects": prompt_objects.ping, "records": self.records.ping})
        metrics.register(ServingState(self.watcher, lambda: self.degraded, self._gauges(), self._counters()))
        ProcessCollector(registry=metrics)
        self._background = [
            Periodic("champion watcher", self.watcher.poll_once, settings.serving.poll_seconds),
            Periodic("neighbours", self.neighbours.check_once, NEIGHBOUR_SECONDS),
        ]
        if apart:
            self._background.append(Periodic("collector", self.collector.collect_once, COLLECT_SECONDS))

    def start(self) -> None:
        self.recorder.start()
        self.predictor.start()
        if self.shadow is not None:
            self.shadow.start()
        for work in self._background:
            work.start()

    def stop(self) -> None:
        """End everything by the time that the readiness names, whatever hangs; the recorder has its seconds always."""
        stop_by = self._readiness.stop_by or time.monotonic() + STOP_SECONDS

        def left() -> float:
            return max(0.0, stop_by - RECORDING_SECONDS - time.monotonic())

        parts: list[Shadow | Periodic] = [*([self.shadow] if self.shadow is not None else []), *self._background]
        for part in parts:  # all are told before any is waited for
            part.begin_stop()
        self.predictor.stop(left())
        for turns in (self.correcting, self.reading):
            turns.close()
        self.dicom.close()
        self.correction_dicom.close()
        for part in parts:
            part.stop(min(left(), PART_SECONDS))
        self.recorder.stop(left() + RECORDING_SECONDS)
        self.records.close()

    @property
    def degraded(self) -> dict[str, str]:
        recording = {"records": self.recorder.problem} if self.recorder.problem else {}
        return self.neighbours.degraded | recording | self.watcher.degraded

    def describe(self) -> ServedModel:
        shadow = self.shadow.describe() if self.shadow is not None else None
        return self.watcher.describe().model_copy(update={"shadow": shadow, "degraded": self.degraded})

    def recent(self, limit: int) -> list[Prediction]:
        """The newest predictions that are recorded; one that this release cannot read is told in the log."""
        found: list[Prediction] = []
        for record in self.records.find("predictions", limit=limit).items:
            try:
                found.append(Prediction.model_validate(record.document))
            except ValidationError:
                logger.exception("the record of prediction %s cannot be read", record.id)
        return found

    async def correct(self, submission: Submission) -> tuple[Correction, bool]:
        """What `Corrections.submit` returns, in time whatever hangs; reading DICOM may take its own time besides."""
        dicom = submission.image is not None and is_dicom(submission.image)
        within = self.answer_seconds + (2 * DICOM_SECONDS if dicom else 0.0)
        return await self.correcting.take(lambda: self.corrections.submit(submission), within)

    def check_door(self) -> None:
        """Raise Overloaded unless one more request can be answered in time; whoever is turned away is counted."""
        try:
            self.predictor.admission.check()
        except Overloaded as exc:
            self.metrics.turned_away(exc.code)
            raise

    def _gauges(self) -> list[Read]:
        admission, recorder, spool = self.predictor.admission, self.recorder, self.spool
        collector = self.collector
        return [
            ("medloop_batch_limit_images", "Images of the largest batch now", lambda: self.predictor.pace_limit),
            ("medloop_queue_images", "Images that wait or are answered now", lambda: admission.images),
            (
                "medloop_queue_wait_seconds",
                "Predicted wait of an image that came now",
                lambda: admission.predicted_wait,
            ),
            ("medloop_records_waiting", "Predictions on their way to the records", lambda: recorder.waiting),
            ("medloop_spool_bytes", "Bytes of predictions on this disk", lambda: spool.size),
            ("medloop_spool_objects", "Objects that ended replicas left, at the last look", lambda: collector.waiting),
            ("medloop_tracking_age_seconds", "Since MLflow last answered", lambda: self.watcher.tracking_age),
        ]

    def _counters(self) -> list[Read]:
        recorder, spool, collector = self.recorder, self.spool, self.collector
        counters: list[Read] = [
            ("medloop_records_dropped", "Predictions that were never recorded", lambda: recorder.dropped),
            (
                "medloop_records_refused",
                "Predictions that records do not take",
                lambda: recorder.refused + collector.refused,
            ),
            ("medloop_spool_torn", "Predictions that a kill cut off in the spool", lambda: spool.torn),
            ("medloop_spool_damaged", "Segments that cannot be read", lambda: spool.damaged + collector.damaged),
            ("medloop_spool_removed", "Damaged segments that gave way to newer ones", lambda: spool.removed),
            ("medloop_spool_collected", "Predictions recorded for ended replicas", lambda: collector.recorded),
        ]
        if (shadow := self.shadow) is not None:
            counters += [
                ("medloop_shadow_compared", "Images this challenger answered", lambda: shadow.describe().compared),
                ("medloop_shadow_skipped", "Images it missed", lambda: shadow.describe().skipped),
                (
                    "medloop_shadow_disagreements",
                    "Images it gave another label",
                    lambda: shadow.describe().disagreements,
                ),
            ]
        return counters

    def _wanted(self, settings: Settings) -> Wanted:
        model, engine = settings.serving.model, settings.engine

        def check(version: str, digest: str) -> EngineCheck | None:
            return find_check(self.records, model, version, digest, engine.engine, engine.precision)

        return Wanted(engine.engine, engine.precision, engine.engine_threads, Pace.FIRST, check)

    # What the predictor tells, from a lane's thread.

    def settled(self, settled: Settled) -> None:
        """Count answers and refusals; answers are also recorded."""
        entries: list[Entry] = []
        for item, outcome in settled:
            if isinstance(outcome, MedLoopError):
                self.metrics.refused(outcome.code)
                continue
            self.metrics.answered(item.served.ref.version, outcome.document["decision"])
            document = record_of(outcome, item.asker.request_id, item.asker.name)
            entries.append(Entry(document, (item.plain or item.image) if item.stored else None))
        if entries:
            self.recorder.record(entries)

    def delivered(self, settled: Settled) -> None:
        if self.shadow is None:
            return
        for item, outcome in settled:
            if not isinstance(outcome, MedLoopError):
                self.shadow.offer(outcome.document, item.image, item.pixels, item.served.bundle.card.preparation)
