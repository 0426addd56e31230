"""Asking inference about uploaded images: few requests, and every image with an answer or a reason of its own."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from medloop.clients import InferenceClient, error_from
from medloop.errors import MedLoopError
from medloop.schemas import Prediction, PredictionItem

from medloop_dashboard.connections import outcome

MAX_BATCH_BYTES = 16 * 2**20
"""Sent in one request, unless one image alone is larger: well below what services take in (64 MiB)."""
MAX_BATCH_IMAGES = 32


@dataclass(frozen=True, slots=True)
class Upload:
    """An image file that a person chose; `digest` is the SHA-256 of its bytes."""

    name: str
    data: bytes
    digest: str

    @classmethod
    def of(cls, name: str, data: bytes) -> "Upload":
        return cls(name, data, hashlib.sha256(data).hexdigest())


Answer = Prediction | MedLoopError


def ask(inference: InferenceClient, uploads: Sequence[Upload]) -> dict[str, Answer]:
    """Each upload's answer or error, by digest. Equal files are sent once."""
    answers: dict[str, Answer] = {}
    for batch in _batches(list({upload.digest: upload for upload in uploads}.values())):
        answers |= _ask_batch(inference, batch)
    return answers


def _ask_batch(inference: InferenceClient, batch: Sequence[Upload]) -> dict[str, Answer]:
    answered = outcome(lambda: inference.predict_many([upload.data for upload in batch], cam=True))
    if isinstance(answered, MedLoopError):
        return {upload.digest: answered for upload in batch}
    return {batch[item.index].digest: _answer(item) for item in answered.items}


def _answer(item: PredictionItem) -> Answer:
    if item.prediction is not None:
        return item.prediction
    return error_from(item.problem.model_dump() if item.problem else {})


def _batches(uploads: Sequence[Upload]) -> Iterator[list[Upload]]:
    batch: list[Upload] = []
    size = 0
    for upload in uploads:
        if batch and (size + len(upload.data) > MAX_BATCH_BYTES or len(batch) == MAX_BATCH_IMAGES):
            yield batch
            batch, size = [], 0
        batch.append(upload)
        size += len(upload.data)
    if batch:
        yield batch
