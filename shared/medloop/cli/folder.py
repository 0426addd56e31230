"""`predict FOLDER --out FILE`: every file of a folder in one table, answered, refused or skipped, each with the reason.

What is known lies in a journal beside the table until it is complete, so that a run that was cut short goes on where it
ended; files that the same model version has answered already are not asked about again.
"""

import hashlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medloop.cli.output import console, progress_bars, show, table
from medloop.cli.results import Journal, Row
from medloop.clients import InferenceClient
from medloop.errors import InvalidImage, MedLoopError, NoModel, NotFound, Overloaded, RateLimited
from medloop.schemas import ModelRef, PredictionItem
from medloop.vision.containers import sniff
from medloop.vision.dicom import is_dicom

INTERRUPTED = 130
BATCH_IMAGES, BATCH_BYTES = 32, 16 * 2**20
REQUESTS = 4
"""In flight at once: the service decodes one while the network runs on another, and the next is on its way."""
PATIENCE_S = 300.0
"""How long a service that refuses for load is asked again and again."""
_SNIFFED = 132  # bytes: DICOM's mark ends there, the others' before


@dataclass(frozen=True, slots=True)
class _Image:
    file: str
    sha256: str
    data: bytes


def predict_folder(address: str, folder: Path, out: Path, as_json: bool) -> int:
    """Write a row for each file below `folder` to `out`; returns the exit status."""
    journal = Journal(out)
    files = [name for name in _walk(folder) if (folder / name).absolute() not in (out.absolute(), journal.path)]
    if not files:
        raise NotFound(f"There is no file in {folder}.")
    started = time.monotonic()
    with InferenceClient(address, timeout=PATIENCE_S) as inference:
        served = inference.served_model()
        if served.model is None:
            raise NoModel("Inference has no approved champion to answer with; approve a version with medloop approve.")
        try:
            with journal, progress_bars() as progress:
                run = _Run(inference, served.model, folder, journal, lambda done: progress("predict", done, len(files)))
                run.go(files)
        except (KeyboardInterrupt, MedLoopError) as exc:
            console.print(f"{journal.path} keeps what is answered; the same command goes on from there.")
            if isinstance(exc, KeyboardInterrupt):
                return INTERRUPTED
            raise
    counts = _Counts()
    journal.finish(files, served.classes, counts.add)
    _tell(counts, run.asked, out, time.monotonic() - started, as_json)
    return InvalidImage.exit_status if counts.statuses["refused"] else 0


def _walk(folder: Path) -> list[str]:
    """All files below `folder`, as POSIX paths relative to it, in order; links to folders are not followed."""
    found = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
    return sorted(path.relative_to(folder).as_posix() for path in found)


class _Run:
    """Asks about what the journal does not know yet, a few requests at a time."""

    def __init__(
        self, inference: InferenceClient, model: ModelRef, folder: Path, journal: Journal, report: Callable[[int], None]
    ) -> None:
        self._inference, self._model, self._folder, self._journal = inference, model, folder, journal
        self._report = report
        self._flying: set[Future[list[Row]]] = set()
        self._stopping = threading.Event()
        self._done = 0
        self.asked = 0

    def go(self, files: Sequence[str]) -> None:
        batch: list[_Image] = []
        with ThreadPoolExecutor(REQUESTS, "predict") as threads:
            try:
                for name in files:
                    found = _read(self._folder / name, name)
                    if not isinstance(found, _Image):
                        self._settle([found])
                    elif self._journal.knows(name, found.sha256, self._model):
                        self._settle([], reused=1)
                    else:
                        batch.append(found)
                    if len(batch) >= BATCH_IMAGES or sum(len(image.data) for image in batch) >= BATCH_BYTES:
                        self._land(REQUESTS - 1)
                        self._flying.add(threads.submit(self._ask, batch))
                        batch = []
                if batch:
                    self._flying.add(threads.submit(self._ask, batch))
                self._land(0)
            finally:
                self._stopping.set()  # who waits for a busy service need not do so any longer

    def _land(self, at_most: int) -> None:
        """Wait until no more than `at_most` requests are in flight."""
        while len(self._flying) > at_most:
            landed, self._flying = wait(self._flying, return_when=FIRST_COMPLETED)
            for future in landed:
                rows = future.result()
                self.asked += len(rows)
                self._settle(rows)

    def _settle(self, rows: list[Row], reused: int = 0) -> None:
        self._journal.add(rows)
        self._done += len(rows) + reused
        self._report(self._done)

    def _ask(self, batch: Sequence[_Image]) -> list[Row]:
        """A row for each image; a service that refuses for load is asked again after the time that it names."""
        items: dict[int, PredictionItem] = {}
        waiting, give_up = list(range(len(batch))), time.monotonic() + PATIENCE_S
        while waiting and not self._stopping.is_set():
            pause = 1
            try:
                for item in self._inference.stream([batch[index].data for index in waiting]):
                    items[waiting[item.index]] = item
            except RateLimited as exc:
                if time.monotonic() + exc.retry_after > give_up:
                    raise
                pause = exc.retry_after
            waiting = [index for index in waiting if _is_to_be_asked_again(items.get(index))]
            if waiting and time.monotonic() > give_up:
                break
            if waiting:
                self._stopping.wait(pause)
        return [_row(batch[index], item) for index, item in items.items()]


def _is_to_be_asked_again(item: PredictionItem | None) -> bool:
    return item is None or (item.problem is not None and item.problem.code in (Overloaded.code, RateLimited.code))


def _read(path: Path, name: str) -> _Image | Row:
    """The file if its content is an image's, else its row."""
    try:
        with path.open("rb") as file:
            head = file.read(_SNIFFED)
            if not is_dicom(head):
                sniff(head)
            data = head + file.read()
    except OSError as exc:
        return Row(file=name, status="skipped", error_code="unreadable", error=f"It cannot be read: {exc.strerror}.")
    except InvalidImage as exc:
        return Row(file=name, status="skipped", error_code=exc.code, error=exc.detail)
    return _Image(name, hashlib.sha256(data).hexdigest(), data)


def _row(image: _Image, item: PredictionItem) -> Row:
    if item.prediction is None:
        code, detail = (item.problem.code, item.problem.detail) if item.problem else (MedLoopError.code, "No reason.")
        return Row(file=image.file, sha256=image.sha256, status="refused", error_code=code, error=detail)
    p = item.prediction
    return Row(
        file=image.file,
        sha256=image.sha256,
        status="answered",
        label=p.label,
        probabilities=p.probabilities,
        prediction_set=p.prediction_set,
        decision=p.decision,
        reasons=list(p.reasons),
        outlier_score=p.outlier.score if p.outlier else None,
        outlier_percentile=p.outlier.percentile if p.outlier else None,
        model=p.model.name,
        version=p.model.version,
        prediction_id=p.id,
    )


class _Counts:
    """What the finished table holds, by status, and of the answered rows by label and version."""

    def __init__(self) -> None:
        self.statuses, self.labels, self.referred, self.versions = (Counter[str]() for _ in range(4))

    def add(self, row: Row) -> None:
        self.statuses[row.status] += 1
        if row.status == "answered":
            self.labels[str(row.label)] += 1
            self.versions[f"{row.model} version {row.version}"] += 1
            self.referred[str(row.label)] += row.decision == "refer"


def _tell(counts: _Counts, asked: int, out: Path, seconds: float, as_json: bool) -> None:
    rate = asked / seconds if seconds > 0 else 0.0
    document = {
        "out": str(out),
        "files": counts.statuses.total(),
        **{status: counts.statuses[status] for status in ("answered", "refused", "skipped")},
        "referred": counts.referred.total(),
        "asked": asked,
        "labels": dict(counts.labels),
        "versions": dict(counts.versions),
        "seconds": round(seconds, 3),
        "images_per_second": round(rate, 1),
    }
    rows: list[tuple[Any, ...]] = [
        (label, f"{number:,}", f"{counts.referred[label]:,}") for label, number in counts.labels.most_common()
    ]
    for status in ("refused", "skipped"):
        if counts.statuses[status]:
            rows.append((status, f"{counts.statuses[status]:,}", ""))
    by = " and ".join(sorted(counts.versions)) or "nobody"
    title = f"{out}: answered by {by}; {asked:,} images asked, {rate:,.0f}/s"
    show(document, as_json, table(title, ["label", "images", "referred"], rows))
    if len(counts.versions) > 1:
        console.print(
            "The model changed meanwhile: the same command asks the present version about the others' images."
        )
