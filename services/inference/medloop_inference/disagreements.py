"""What is kept of images that champion and challenger answer differently: records, written in batches."""

import logging
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from medloop.errors import MedLoopError, StorageFull, Unavailable
from medloop.schemas import Disagreement, ModelRef
from medloop.storage.records import RecordStore

logger = logging.getLogger(__name__)

FLUSH_SECONDS, FLUSH_AT = 2.0, 64
"""Disagreements are written when the oldest is this old, or when there are so many."""
KEPT = 1000
"""Disagreements that may wait while records are down: under a megabyte for ten classes."""


def compare(prediction: Mapping[str, Any], challenger: ModelRef, answer: Mapping[str, float]) -> Disagreement | None:
    """What to record about the challenger's probabilities; None when it names the champion's label, too."""
    label = max(answer, key=lambda name: answer[name])
    if label == prediction["label"]:
        return None
    return Disagreement(
        prediction_id=prediction["id"],
        model=challenger.name,
        champion=prediction["model"]["version"],
        challenger=challenger.version,
        image_hash=prediction["image_hash"],
        champion_label=prediction["label"],
        champion_probabilities=prediction["probabilities"],
        challenger_label=label,
        challenger_probabilities=dict(answer),
    )


class Diary:
    """Disagreements on their way to records; used by one thread. `problem` says what is wrong with writing them."""

    def __init__(self, records: RecordStore, seconds: float) -> None:
        self._records, self._seconds = records, seconds
        self._waiting: deque[Disagreement] = deque()
        self._due = 0.0
        self._lost = 0
        self.problem: str | None = None

    def add(self, found: Disagreement) -> None:
        if not self._waiting:
            self._due = time.monotonic() + self._seconds
        if len(self._waiting) >= KEPT:
            self._waiting.popleft()
            self._lost += 1
        self._waiting.append(found)

    def write_if_due(self) -> None:
        if time.monotonic() >= self._due or (len(self._waiting) >= FLUSH_AT and self.problem is None):
            self.write()

    def write(self) -> None:
        """Write all that waits; what cannot be written now stays for the next time."""
        if not self._waiting:
            return
        self._due = time.monotonic() + self._seconds
        items = [(found.prediction_id, found.model_dump(mode="json")) for found in self._waiting]
        try:
            self._records.put_many("disagreements", items)
        except (Unavailable, StorageFull) as exc:
            self._told(f"{exc.detail} {self._lost} disagreements were lost so far.")
            return
        except MedLoopError:
            logger.exception("records refused disagreements")
            self._lost += len(items)
        self._waiting.clear()
        self._told(f"{self._lost} disagreements were lost." if self._lost else None)

    def close(self) -> None:
        """Write what waits, now or never."""
        self.write()
        if self._waiting:
            logger.error("%d disagreements were not recorded: %s", len(self._waiting), self.problem)

    def _told(self, problem: str | None) -> None:
        if (problem is None) != (self.problem is None):
            logger.warning("disagreements: %s", problem or "written again")
        self.problem = problem
