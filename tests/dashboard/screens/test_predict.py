"""The page that asks, explains and corrects."""

from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
from medloop.errors import StorageUnavailable
from medloop.schemas import ServedModel
from medloop.testing import free_port
from medloop.vision.decode import decode
from medloop.vision.encode import encode_png
from medloop_dashboard.screens import elements
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid
from streamlit.testing.v1 import AppTest

from ..fakes import HOSTILE, Fakes

Page = Callable[[str], AppTest]
Texts = Callable[[AppTest], str]

BRIGHT = encode_png(np.full((16, 16, 1), 250, np.uint8))
GREY = encode_png(np.full((16, 16, 1), 130, np.uint8))
BLACK = encode_png(np.full((16, 16, 1), 2, np.uint8))


def dicom(pixels: NDArray[np.uint8]) -> bytes:
    """A file of one frame, [H, W]."""
    meta, dataset = FileMetaDataset(), Dataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta = meta
    dataset.SOPClassUID = meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.PixelData = pixels.tobytes()
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def upload(app: AppTest, *files: tuple[str, bytes]) -> AppTest:
    return app.file_uploader(key="images").set_value([(name, data, "image/png") for name, data in files]).run()


def save(app: AppTest, *, label: str | None, author: str, comment: str = "") -> AppTest:
    box = next(box for box in app.selectbox if box.label == "Right label")
    if label is not None:
        box.select(label)
    next(field for field in app.text_input if field.label == "Your name").input(author)
    app.text_area[0].input(comment)
    return next(button for button in app.button if button.label == "Save correction").click().run()


def test_one_image_gets_answer_and_explanations(page: Page, fakes: Fakes, texts: Texts) -> None:
    app = upload(page("predict").run(), ("a.png", BRIGHT))
    said = texts(app)
    assert not app.error
    assert not app.exception
    assert "bright, 98.0 %" in said
    assert "every other class can be ruled out" in said
    assert "tiny version 1" in said.replace("\\", "")
    assert "3.5 ms" in said.replace("\\", "")
    # The very version that answered is explained, for the label it gave.
    assert fakes.explained == [{"model": "tiny", "version": "1", "target": "bright"}]
    assert "Integrated Gradients" in said
    assert "SHAP" in said


def test_an_undecided_answer_is_told_in_words(page: Page, fakes: Fakes, texts: Texts) -> None:
    app = upload(page("predict").run(), ("a.png", GREY))
    assert "no class can be ruled out" in texts(app)
    assert [warning.proto.title for warning in app.warning] == ["Refer to a person"]
    assert "cannot tell bright and dark apart" in app.warning[0].value
    assert not app.info


def test_an_accepted_answer_is_calm_and_says_how_like_the_training_images_it_is(
    page: Page, fakes: Fakes, texts: Texts
) -> None:
    app = upload(page("predict").run(), ("a.png", BRIGHT))
    assert [info.proto.title for info in app.info] == ["Accepted"]
    assert not app.warning
    assert "further from the training images than 2 % of them" in texts(app).replace("\\", "")
    # The upload, its class activation map and two attributions.
    assert len(app.image) == 4
    assert "adds to bright" in texts(app)


def test_an_image_of_another_kind_is_referred_whatever_its_probability(page: Page, fakes: Fakes, texts: Texts) -> None:
    fakes.warnings = ["The image may show text that names a patient."]
    app = upload(page("predict").run(), ("a.png", BLACK), ("b.png", BRIGHT))
    assert app.dataframe[0].value["Decision"].tolist() == ["refer to a person", "accepted"]
    assert "dark, 99.2 %" in texts(app)
    assert [warning.proto.title for warning in app.warning] == ["Refer to a person", "About this image"]
    assert "unlike those that the model was trained on" in app.warning[0].value
    assert "names a patient" in app.warning[1].value
    assert "What to do" in texts(app)


def test_what_a_model_cannot_say_is_said(page: Page, fakes: Fakes, texts: Texts) -> None:
    fakes.cam = fakes.outliers = False
    app = upload(page("predict").run(), ("a.png", BRIGHT))
    assert "No class activation map" in texts(app)
    assert "would not be noticed" in texts(app)
    assert len(app.image) == 3


def test_a_rerun_asks_nothing_again(page: Page, fakes: Fakes) -> None:
    app = upload(page("predict").run(), ("a.png", BRIGHT), ("b.png", GREY))
    app.run().run()
    assert len(fakes.predicted) == 2
    assert len(fakes.explained) == 1


def test_a_broken_image_is_refused_alone(page: Page, fakes: Fakes, texts: Texts) -> None:
    app = upload(page("predict").run(), ("a.png", BRIGHT), ("broken.png", BRIGHT[:60]))
    assert not app.exception
    table = app.dataframe[0].value
    assert table["Answer"].tolist() == ["bright", ""]
    assert table["Problem"][1]
    app.selectbox[0].select_index(1).run()
    assert app.error[0].proto.title == "No answer for this image"
    assert len(app.image) == 0


def test_a_correction_is_stored_once_and_shown(page: Page, fakes: Fakes) -> None:
    app = save(upload(page("predict").run(), ("a.png", BRIGHT)), label="dark", author=" Ada ", comment=HOSTILE)
    stored = fakes.corrections[0]
    assert (stored.label, stored.author, stored.comment) == ("dark", "Ada", HOSTILE)
    assert stored.id in app.success[0].value.replace("\\", "")
    assert "pending" in app.success[0].value
    app.run()
    assert len(fakes.corrections) == 1


@pytest.mark.parametrize(("label", "author"), [(None, "Ada"), ("dark", "  ")])
def test_a_correction_needs_label_and_name(page: Page, fakes: Fakes, label: str | None, author: str) -> None:
    app = save(upload(page("predict").run(), ("a.png", BRIGHT)), label=label, author=author)
    assert "Choose the right label" in app.error[0].value
    assert not fakes.corrections


def test_a_correction_that_was_not_stored_is_not_claimed(page: Page, fakes: Fakes) -> None:
    app = upload(page("predict").run(), ("a.png", BRIGHT))
    fakes.refuse = StorageUnavailable("The object store does not answer.")
    app = save(app, label="dark", author="Ada")
    assert not app.success
    assert "object store does not answer" in app.error[0].value
    fakes.refuse = None
    app = save(app, label="dark", author="Ada")
    assert app.success
    assert not app.error


def test_without_the_explainer_the_answer_stands(
    page: Page, fakes: Fakes, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MEDLOOP_EXPLAINER_URL", address)
    app = upload(page("predict").run(), ("a.png", BRIGHT))
    assert "bright, 98.0 %" in texts(app)
    assert address in app.error[0].value.replace("\\", "")
    assert "medloop up" in app.error[0].value


def test_without_inference_the_page_says_so_and_asks_again_on_demand(
    page: Page, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDLOOP_INFERENCE_URL", f"http://127.0.0.1:{free_port()}")
    app = upload(page("predict").run(), ("a.png", BRIGHT))
    assert not app.exception
    assert [error.proto.title for error in app.error] == ["Inference cannot be asked", "No answer for this image"]
    fakes.refuse = None
    monkeypatch.setenv("MEDLOOP_INFERENCE_URL", fakes.url)
    elements.connections.clear()
    app.run()
    assert len(app.error) == 1, "an error, too, is not asked about again by itself"
    next(button for button in app.button if button.label == "Ask again").click().run()
    assert not app.error


def test_says_when_nothing_is_approved_and_what_is_degraded(page: Page, fakes: Fakes, texts: Texts) -> None:
    fakes.served = ServedModel(model=None, degraded={"tracking": "MLflow does not answer."})
    said = texts(page("predict").run())
    assert "Nothing is approved to answer yet" in said
    assert "MLflow does not answer" in said


def test_names_are_shown_as_text_only(page: Page, fakes: Fakes) -> None:
    app = upload(page("predict").run(), (HOSTILE, BRIGHT))
    assert HOSTILE in [element.value for element in app.text]
    assert not any(HOSTILE in element.value for element in app.markdown)


def test_dicom_is_asked_about_shown_explained_and_corrected(page: Page, fakes: Fakes) -> None:
    pixels = np.full((16, 16), 250, np.uint8)
    pixels[:, 8:] = 240
    sent = dicom(pixels)
    app = page("predict").run()
    uploader = app.file_uploader(key="images")
    assert "DICOM" in uploader.label
    assert not uploader.proto.type, "a file of DICOM may have no ending to be listed by"
    app = save(upload(app, ("IM000001", sent)).run(), label="dark", author="Ada")
    assert not app.error
    assert len(app.image) == 4, "the upload is shown, too"
    assert fakes.predicted == [sent]
    assert fakes.corrected == [sent]
    assert [decode(image).pixels[..., 0].tolist() for image in fakes.shown] == [pixels.tolist()]


def test_whom_the_proxy_signed_in_signs_corrections(page: Page, fakes: Fakes, signed_in: str) -> None:
    app = upload(page("predict").run(), ("a.png", BRIGHT))
    name = next(field for field in app.text_input if field.label == "Your name")
    assert (name.value, name.disabled) == (signed_in, True)
    name.proto.disabled = False  # as in a browser that was tampered with
    app = save(app, label="dark", author="Somebody else")
    assert [correction.author for correction in fakes.corrections] == [signed_in]
