"""A correction is durable when it is acknowledged, is one however often it is sent, and claims nothing that failed."""

import errno
import hashlib
import os
import struct
import uuid
import zlib
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from medloop.errors import (
    Conflict,
    InvalidImage,
    InvalidRequest,
    StorageFull,
    StorageUnavailable,
    UnsupportedImage,
)
from medloop.schemas import ModelRef, Prediction, new_id
from medloop.storage.folder import FolderObjects
from medloop.storage.objects import ObjectStore, open_objects
from medloop.storage.records import RecordStore, open_records
from medloop.vision.decode import decode
from medloop.vision.dicom_reader import DicomReader
from medloop.vision.encode import encode_png
from medloop.vision.golden import awkward_images
from medloop_inference.corrections import Corrections, Submission, correction_id
from medloop_inference.delivery import store_image
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

IMAGE = encode_png(np.full((8, 8), 9, np.uint8))
TEXT = b"tEXtName\0Jane D"
TEXT_CHUNK = struct.pack(">I", len(TEXT) - 4) + TEXT + struct.pack(">I", zlib.crc32(TEXT))


@pytest.fixture
def corrections(objects: ObjectStore, records: RecordStore) -> Corrections:
    return Corrections("tiny", objects, records)


def submission(
    prediction_id: str | None = None, image: bytes | None = IMAGE, label: str = "dark", frame: int | None = None
) -> Submission:
    return Submission(uuid.UUID(prediction_id or new_id()), label, "Dr. Test", "", image, frame)


def recorded(
    records: RecordStore, image: bytes, frame: int | None = None, prediction_id: str | None = None, **extra: str
) -> Prediction:
    prediction = Prediction(
        id=prediction_id or new_id(),
        frame=frame,
        model=ModelRef(name="tiny", version="3", run_id="r", dataset_id="d", bundle_digest="b"),
        image_hash=hashlib.sha256(image).hexdigest(),
        label="bright",
        probabilities={"dark": 0.1, "bright": 0.9},
        prediction_set=["bright"],
        coverage=0.95,
        milliseconds={},
    )
    records.put_once("predictions", prediction.id, prediction.model_dump(mode="json") | extra)
    return prediction


def test_a_correction_names_what_it_corrects(corrections: Corrections, records: RecordStore) -> None:
    prediction = recorded(records, IMAGE)
    correction, new = corrections.submit(submission(prediction.id))
    assert new
    assert (correction.model, correction.version, correction.predicted_label) == ("tiny", "3", "bright")
    assert (correction.label, correction.status, correction.author) == ("dark", "pending", "Dr. Test")
    assert corrections.recent("pending", 10) == [correction]
    assert corrections.recent("accepted", 10) == []


def test_it_may_come_before_the_prediction_s_record(corrections: Corrections) -> None:
    correction, new = corrections.submit(submission())
    assert new
    assert (correction.model, correction.version, correction.predicted_label) == ("tiny", None, None)


def test_the_stored_image_has_the_pixels_and_no_metadata(corrections: Corrections, objects: ObjectStore) -> None:
    header = IMAGE[:33]  # signature and IHDR
    marked = header + TEXT_CHUNK + IMAGE[33:]
    assert b"Jane" in marked
    correction, _ = corrections.submit(submission(image=marked))
    stored = objects.get(f"images/{correction.image_hash[:2]}/{correction.image_hash}")
    assert b"Jane" not in stored
    assert hashlib.sha256(stored).hexdigest() == correction.image_hash
    assert np.array_equal(decode(stored).pixels, decode(marked).pixels)


def test_the_same_correction_twice_is_one(corrections: Corrections, records: RecordStore) -> None:
    sent = submission()
    (once, new), (again, newer) = corrections.submit(sent), corrections.submit(sent)
    assert (new, newer) == (True, False)
    assert once == again
    other, _ = corrections.submit(submission(str(sent.prediction_id), label="bright"))
    assert other.id != once.id
    assert len(records.find("corrections").items) == 2


def test_a_second_one_needs_no_image(corrections: Corrections, records: RecordStore) -> None:
    prediction = recorded(records, IMAGE)
    correction, _ = corrections.submit(submission(prediction.id))
    second, new = corrections.submit(submission(prediction.id, None, "bright"))
    assert new
    assert (second.image_hash, second.file_hash) == (correction.image_hash, prediction.image_hash)


def test_what_came_before_the_prediction_s_record_lends_its_image_only_if_it_was_the_predicted_one(
    corrections: Corrections, records: RecordStore
) -> None:
    another = encode_png(np.full((8, 8), 200, np.uint8))
    early, _ = corrections.submit(submission())
    with pytest.raises(InvalidRequest, match="send it with the correction"):  # nobody can say yet which image it was
        corrections.submit(submission(early.prediction_id, None, "bright"))
    wrong, _ = corrections.submit(submission(early.prediction_id, another, "bright"))
    assert early.file_hash == hashlib.sha256(IMAGE).hexdigest() != wrong.file_hash
    recorded(records, IMAGE, prediction_id=early.prediction_id)
    honest, _ = corrections.submit(submission(early.prediction_id, None, "bright"))
    assert honest.image_hash == early.image_hash != wrong.image_hash
    poisoned, _ = corrections.submit(submission(image=another))
    recorded(records, IMAGE, prediction_id=poisoned.prediction_id)
    with pytest.raises(InvalidRequest, match="send it with the correction"):
        corrections.submit(submission(poisoned.prediction_id, None))


def test_an_image_that_was_stored_with_the_prediction_need_not_be_sent(
    corrections: Corrections, records: RecordStore, objects: ObjectStore
) -> None:
    image_hash = store_image(objects, IMAGE)
    prediction = recorded(records, IMAGE, stored_image=image_hash)
    (without, new), (with_it, newer) = (corrections.submit(submission(prediction.id, sent)) for sent in (None, IMAGE))
    assert (new, newer) == (True, False)  # the same correction either way
    assert without == with_it
    assert without.image_hash == image_hash
    objects.delete(f"images/{image_hash[:2]}/{image_hash}")
    with pytest.raises(InvalidRequest, match="send it with the correction"):
        corrections.submit(submission(prediction.id, None, "bright"))


def test_nothing_is_claimed_while_nobody_can_say_that_the_image_is_there(
    records: RecordStore, objects: ObjectStore
) -> None:
    class Down(FolderObjects):
        def exists(self, key: str) -> bool:
            raise StorageUnavailable("The objects are away; try again.")

    prediction = recorded(records, IMAGE, stored_image=store_image(objects, IMAGE))
    with pytest.raises(StorageUnavailable):
        Corrections("tiny", Down(Path("unused")), records).submit(submission(prediction.id, None))
    assert records.find("corrections").items == ()


def test_one_that_was_written_but_never_acknowledged_may_be_sent_again(
    objects: ObjectStore, records: RecordStore
) -> None:
    class LosesTheAnswer:
        """Records that write a correction and then fail, once."""

        lost = False

        def __getattr__(self, name: str) -> Any:
            return getattr(records, name)

        def put_once(self, kind: str, record_id: str, document: Mapping[str, Any]) -> bool:
            new = records.put_once(kind, record_id, document)
            if not self.lost:
                self.lost = True
                raise StorageUnavailable("No majority has confirmed it; try again.")
            return new

    corrections = Corrections("tiny", objects, LosesTheAnswer())
    sent = submission()
    with pytest.raises(StorageUnavailable):
        corrections.submit(sent)
    correction, new = corrections.submit(sent)
    assert not new
    assert [record.id for record in records.find("corrections").items] == [correction.id]


def test_without_a_stored_image_one_must_be_sent(corrections: Corrections) -> None:
    with pytest.raises(InvalidRequest, match="send it with the correction"):
        corrections.submit(submission(image=None))


def test_another_image_than_the_predicted_one_is_refused(corrections: Corrections, records: RecordStore) -> None:
    prediction = recorded(records, IMAGE)
    with pytest.raises(Conflict, match="not the image"):
        corrections.submit(submission(prediction.id, encode_png(np.zeros((8, 8), np.uint8))))


def test_an_image_that_nobody_can_read_is_not_kept(
    corrections: Corrections, objects: ObjectStore, records: RecordStore
) -> None:
    jpeg = awkward_images(32)[1]
    spoilt = IMAGE.replace(b"IHDR\0\0\0\x08", b"IHDR\0\0\0\x09")  # announces other pixels than it holds
    for data in (b"", b"text", jpeg[: len(jpeg) // 2], spoilt):
        with pytest.raises(InvalidImage):
            corrections.submit(submission(image=data))
    assert list(objects.list()) == []
    assert records.find("corrections").items == ()


def dicom_file(frames: Sequence[NDArray[np.uint8]]) -> bytes:
    dataset = Dataset()
    dataset.PatientName = "Jane^D"
    dataset.Rows, dataset.Columns = frames[0].shape
    dataset.NumberOfFrames = len(frames)
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.WindowCenter, dataset.WindowWidth = 128, 256
    dataset.PixelData = b"".join(frame.tobytes() for frame in frames)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    file = BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def test_a_frame_of_dicom_is_stored_as_its_pixels_alone(objects: ObjectStore, records: RecordStore) -> None:
    frames = [np.full((8, 8), level, np.uint8) for level in (10, 200)]
    sent = dicom_file(frames)
    with DicomReader() as reader:
        corrections = Corrections("tiny", objects, records, reader)
        prediction = recorded(records, sent, frame=2)
        correction, _ = corrections.submit(submission(prediction.id, sent, frame=2))
        displayed = reader.read(sent, 2).pixels
        assert (correction.file_hash, correction.frame) == (prediction.image_hash, 2)
        second, _ = corrections.submit(submission(prediction.id, None, "bright"))
        assert (second.image_hash, second.frame) == (correction.image_hash, 2)
        for image, frame in ((sent, 1), (sent, None), (None, 1)):
            with pytest.raises(Conflict, match="not the frame"):
                corrections.submit(submission(prediction.id, image, frame=frame))
        early, _ = corrections.submit(submission(image=sent, frame=1))
        recorded(records, sent, frame=2, prediction_id=early.prediction_id)
        with pytest.raises(InvalidRequest, match="send it with the correction"):  # another frame's image is no use
            corrections.submit(submission(early.prediction_id, None, "bright"))
    stored = objects.get(f"images/{correction.image_hash[:2]}/{correction.image_hash}")
    assert np.array_equal(decode(stored).pixels, displayed)
    assert b"Jane" not in stored
    with pytest.raises(UnsupportedImage):
        Corrections("tiny", objects, records).submit(submission(image=sent))


def test_the_only_frame_may_be_named_or_not(objects: ObjectStore, records: RecordStore) -> None:
    sent = dicom_file([np.full((8, 8), 10, np.uint8)])
    with DicomReader() as reader:
        corrections = Corrections("tiny", objects, records, reader)
        for predicted, told in ((None, 1), (1, None), (1, 1)):
            prediction = recorded(records, sent, frame=predicted)
            assert corrections.submit(submission(prediction.id, sent, frame=told))[1]
    plain = recorded(records, IMAGE)
    assert corrections.submit(submission(plain.id, frame=3))[0].frame is None  # which only DICOM has


def test_nothing_is_claimed_while_records_are_down(objects: ObjectStore, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked.sqlite"
    blocked.mkdir()
    records = open_records(f"sqlite:///{blocked}")
    corrections = Corrections("tiny", objects, records)
    sent = submission()
    with pytest.raises(StorageUnavailable):
        corrections.submit(sent)
    blocked.rmdir()
    assert corrections.submit(sent)[1]
    records.close()


def test_nothing_is_claimed_while_objects_are_down(records: RecordStore, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder should be")
    with pytest.raises(StorageUnavailable):
        Corrections("tiny", open_objects(blocked.as_uri()), records).submit(submission())
    assert records.find("corrections").items == ()


@given(moment=st.integers(0, 2**48 - 1), rest=st.integers(0, 2**74 - 1), label=st.text(), author=st.text())
def test_its_id_is_a_uuid7_of_the_prediction_s_time(moment: int, rest: int, label: str, author: str) -> None:
    value = moment << 80 | 0x7 << 76 | (rest >> 62) << 64 | 0b10 << 62 | (rest & (1 << 62) - 1)
    made = uuid.UUID(correction_id(Submission(uuid.UUID(int=value), label, author, "", None), "0" * 64))
    assert made.int >> 80 == moment
    assert (made.version, made.variant) == (7, uuid.RFC_4122)


def test_its_id_follows_from_all_that_it_says() -> None:
    prediction, other = uuid.UUID(new_id()), uuid.UUID(new_id())
    said = [
        (Submission(prediction, "a", "me", "", None), "h"),
        (Submission(other, "a", "me", "", None), "h"),
        (Submission(prediction, "b", "me", "", None), "h"),
        (Submission(prediction, "a", "me", "", None), "i"),
        (Submission(prediction, "a", "you", "", None), "h"),
        (Submission(prediction, "a", "me", "since it is", None), "h"),
    ]
    assert len({correction_id(*each) for each in said}) == len(said)
    assert correction_id(*said[0]) == correction_id(*said[0])


def test_a_full_disk_is_said(records: RecordStore, tmp_path: Path) -> None:
    def full(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StorageFull):
        Corrections("tiny", FolderObjects(tmp_path / "full", write=full), records).submit(submission())
    assert records.find("corrections").items == ()
