"""Corrections: a person's label for a predicted image, acknowledged only once image and label are durable.

A correction's id follows from what it says, so the same correction sent twice, or to two replicas, is one.
"""

import hashlib
import uuid
from dataclasses import dataclass

from medloop.errors import Conflict, InvalidRequest
from medloop.schemas import Correction, Prediction
from medloop.storage.objects import ObjectStore
from medloop.storage.records import Record, RecordStore
from medloop.vision.decode import decode
from medloop.vision.dicom import is_dicom
from medloop.vision.dicom_reader import DicomReader
from medloop.vision.encode import encode_png_canonical, strip_metadata

from medloop_inference.delivery import image_key, store_image

KIND = "corrections"
_EARLIER = 100  # corrections of one prediction that are looked through for its image


@dataclass(frozen=True, slots=True)
class Submission:
    """What a person sends. `prediction_id` is a UUIDv7; `image` the file that was predicted, unless the prediction's
    record is there and its image was stored with it or with an earlier correction, and `frame` which one of a
    multi-frame DICOM, counted from 1."""

    prediction_id: uuid.UUID
    label: str
    author: str
    comment: str
    image: bytes | None
    frame: int | None = None


class Corrections:
    """Corrections of `model`'s predictions, in records (what was said) and objects (the images). DICOM is read by
    `dicom` and stored as PNG; without one it is refused."""

    def __init__(
        self, model: str, objects: ObjectStore, records: RecordStore, dicom: DicomReader | None = None
    ) -> None:
        self._model, self._objects, self._records, self._dicom = model, objects, records, dicom

    def submit(self, submission: Submission) -> tuple[Correction, bool]:
        """Store a correction durably; returns it, and whether it is new. Blocks: decodes, and waits for both stores.

        Raises Conflict for an image or a frame that is not the predicted one; InvalidRequest when an image is needed
        and missing; InvalidImage, UnsupportedImage, ImageTooLarge; what `dicom` raises; StorageUnavailable and
        StorageFull, after which nothing is claimed and the same may be sent again.
        """
        prediction_id = str(submission.prediction_id)
        record = self._records.get("predictions", prediction_id)  # None while it has not arrived yet
        prediction = Prediction.model_validate(record.document) if record else None
        file_hash, frame = _told(submission, prediction)
        _check(record, file_hash, frame)
        image_hash = self._stored(record) if submission.image is None else self._store(submission.image, frame)
        correction = Correction(
            id=correction_id(submission, image_hash),
            prediction_id=prediction_id,
            model=prediction.model.name if prediction else self._model,
            version=prediction.model.version if prediction else None,
            predicted_label=prediction.label if prediction else None,
            label=submission.label,
            image_hash=image_hash,
            file_hash=file_hash,
            frame=frame,
            author=submission.author,
            comment=submission.comment,
        )
        if self._records.put_once(KIND, correction.id, correction.model_dump(mode="json")):
            return correction, True
        stored = self._records.get(KIND, correction.id)
        return (Correction.model_validate(stored.document) if stored else correction), False

    def recent(self, status: str | None, limit: int) -> list[Correction]:
        """Corrections of the newest predictions first."""
        page = self._records.find(KIND, {"status": status} if status else None, limit=limit)
        return [Correction.model_validate(record.document) for record in page.items]

    def _store(self, image: bytes, frame: int | None) -> str:
        """Store the image, freed of metadata, under the hash of what is stored; returns that hash."""
        if self._dicom is not None and is_dicom(image):
            stripped = encode_png_canonical(self._dicom.read(image, frame).pixels)
        else:
            decode(image)  # a file that nobody can read must not become training data
            stripped = strip_metadata(image)
        return store_image(self._objects, stripped)

    def _stored(self, prediction: Record | None) -> str:
        """The hash of the image that was stored with the prediction, or else with an earlier correction of it: one that
        came before the prediction's record may have brought any image."""
        image_hash = prediction.document.get("stored_image") if prediction else None
        if image_hash is None and prediction is not None:
            earlier = self._records.find(KIND, {"prediction_id": prediction.id}, limit=_EARLIER).items
            image_hash = next((each.document["image_hash"] for each in earlier if _fits(prediction, each)), None)
        if image_hash is None or not self._objects.exists(image_key(image_hash)):  # it may have been erased
            raise InvalidRequest("The image of this prediction is not stored: send it with the correction.")
        return str(image_hash)


def _told(submission: Submission, prediction: Prediction | None) -> tuple[str | None, int | None]:
    """The hash of the file that a correction is about, and the frame of it."""
    if submission.image is not None:
        return hashlib.sha256(submission.image).hexdigest(), submission.frame if is_dicom(submission.image) else None
    if prediction is None:
        return None, submission.frame
    return prediction.image_hash, prediction.frame if submission.frame is None else submission.frame


def _check(prediction: Record | None, file_hash: str | None, frame: int | None) -> None:
    if prediction is None:
        return
    if file_hash != prediction.document["image_hash"]:
        raise Conflict(f"This is not the image that prediction {prediction.id} answered; send the same file.")
    if not _same_frame(prediction, frame):
        raise Conflict(f"This is not the frame that prediction {prediction.id} answered; name the same one.")


def _fits(prediction: Record, correction: Record) -> bool:
    """Whether an earlier correction brought the predicted image."""
    told = correction.document
    return bool(told.get("file_hash") == prediction.document["image_hash"]) and _same_frame(
        prediction, told.get("frame")
    )


def _same_frame(prediction: Record, frame: int | None) -> bool:
    """No frame is the first one of one. Predictions recorded by an older version do not tell."""
    predicted = prediction.document
    return "frame" not in predicted or (predicted["frame"] or 1) == (frame or 1)


def correction_id(submission: Submission, image_hash: str) -> str:
    """A UUIDv7 (RFC 9562) with the prediction's time, and a hash of all that was said where random bits would be."""
    prediction_id = submission.prediction_id
    said = "\0".join((str(prediction_id), submission.label, image_hash, submission.author, submission.comment))
    hashed = int.from_bytes(hashlib.sha256(said.encode()).digest()[:16])
    value = (prediction_id.int >> 80 << 80) | (hashed & ((1 << 80) - 1))
    value = value & ~(0xF << 76) | 0x7 << 76  # version
    value = value & ~(0b11 << 62) | 0b10 << 62  # variant
    return str(uuid.UUID(int=value))
