"""From what the network said to what a caller is told: one JSON document for each image.

Thousands of these are made a second, so what is the same for every answer of a version is made once (`Composer`), and
what can be done for a whole batch is.
"""

import base64
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from medloop.bundle import Bundle, Outputs, Pixels, set_size
from medloop.outliers import OutlierModel, decide
from medloop.schemas import SCHEMA_VERSION, ModelRef, Outlier, new_id
from medloop.vision.overlay import overlay
from numpy.typing import NDArray
from pydantic_core import to_json


@dataclass(frozen=True, slots=True)
class Options:
    """What a caller wants: `cam` the class activation map; `frame` of a multi-frame DICOM, counted from 1; `deadline`
    on the clock of `time.monotonic`, after which nobody waits for the answer."""

    cam: bool = False
    frame: int | None = None
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """One prediction: `document` has the fields of `schemas.Prediction`, `json` is the same, encoded; `probabilities`
    f32 [K] and `embedding` f32 [D] are the network's own. `activation` f32 [h, w] is the label's class activation map
    where it was asked for."""

    document: dict[str, Any]
    json: bytes
    probabilities: NDArray[np.float32]
    embedding: NDArray[np.float32]
    activation: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """What an answer needs to know of its image: SHA-256 of its bytes, warnings about it, whether it is kept, the
    seconds of each stage, whether its activation map is wanted, and which frame of DICOM it is."""

    image_hash: str
    seconds: dict[str, float]
    warnings: tuple[str, ...] = ()
    stored: bool = False
    cam: bool = False
    frame: int | None = None


class Composer:
    """Makes the answers of one model version."""

    def __init__(self, ref: ModelRef, bundle: Bundle, outliers: OutlierModel | None) -> None:
        card = bundle.card
        self._model = ref.model_dump(mode="json")
        self._classes = card.classes
        self._coverage = card.conformal.coverage
        self._conformal = card.conformal
        self._outliers = outliers

    def compose(self, asked: list[Asked], outputs: Outputs) -> list[Answer]:
        """The answers to N images, in order; `outputs` hold N rows."""
        created = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        likeliest_first = np.argsort(-outputs.probabilities, axis=1, kind="stable").tolist()
        rows = len(asked)
        outliers = [None] * rows if self._outliers is None else self._outliers.judge(outputs.embedding)
        return [
            self._answer(one, outputs, row, likeliest_first[row], outliers[row], created)
            for row, one in enumerate(asked)
        ]

    def _answer(
        self, asked: Asked, outputs: Outputs, row: int, order: list[int], outlier: Outlier | None, created: str
    ) -> Answer:
        values = outputs.probabilities[row].tolist()
        size = set_size([values[k] for k in order], self._conformal)
        chosen = [self._classes[k] for k in order[:size]]
        decision, reasons = decide(chosen, outlier)
        document = {
            "schema_version": SCHEMA_VERSION,
            "id": new_id(),
            "created_at": created,
            "model": self._model,
            "image_hash": asked.image_hash,
            "label": self._classes[order[0]],
            "probabilities": dict(zip(self._classes, values, strict=True)),
            "prediction_set": chosen,
            "coverage": self._coverage,
            "outlier": None if outlier is None else outlier.__dict__,
            "decision": decision,
            "reasons": reasons,
            "cam": None,
            "warnings": asked.warnings,
            "frame": asked.frame,
            "image_stored": asked.stored,
            "milliseconds": {stage: round(taken * 1000, 3) for stage, taken in asked.seconds.items()},
        }
        activation = outputs.cam[row, order[0]] if asked.cam and outputs.cam is not None else None
        return Answer(document, to_json(document), outputs.probabilities[row], outputs.embedding[row], activation)


def with_activation(answer: Answer, pixels: Pixels) -> Answer:
    """The answer with its class activation map drawn over the prepared image uint8 [S, S, C]; takes milliseconds."""
    if answer.activation is None:
        return answer
    picture = overlay(pixels, np.maximum(answer.activation, 0))
    cam = {
        "label": answer.document["label"],
        "grid": answer.activation.tolist(),
        "overlay": base64.b64encode(picture).decode(),
    }
    document = answer.document | {"cam": cam}
    return Answer(document, to_json(document), answer.probabilities, answer.embedding, answer.activation)


def record_of(answer: Answer, request_id: str | None, caller: str | None) -> bytes:
    """The record of an answer: its document, who asked, and the embedding as base64 of little-endian float16 [D]."""
    embedding = base64.b64encode(answer.embedding.astype("<f2").tobytes()).decode()
    own = to_json({"request_id": request_id, "caller": caller, "embedding": embedding})
    return answer.json[:-1] + b"," + own[1:]
