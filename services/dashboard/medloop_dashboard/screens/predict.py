"""Predict: ask the champion about images, see why it answers so, and correct it."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd
import streamlit as st
from medloop.errors import InvalidRequest, MedLoopError
from medloop.schemas import ClassActivation, Correction, Explanation, Prediction, ServedModel

from medloop_dashboard import charts
from medloop_dashboard.asking import Answer, Upload, ask
from medloop_dashboard.connections import outcome
from medloop_dashboard.pictures import plain_image, viewable
from medloop_dashboard.quality import HOW_TO_READ, METHOD_NAMES, quality_lines
from medloop_dashboard.screens.elements import ask_name, connections, guarded, show_error
from medloop_dashboard.wording import how_unlike, listed, percent, plain, ruled_out, timings, why_referred

_IMAGE_PIXELS = 300
_FORMATS = "Images (PNG, JPEG, TIFF, BMP, GIF, WebP, DICOM)"
_ABOUT_FORMATS = (
    "What a file is, its content says, not its name: DICOM files (.dcm) often have no ending, which no list of endings "
    "can name, so every file may be chosen here. DICOM of several frames cannot be asked about on this page, and "
    "inference reads DICOM where it is installed with the extra `dicom`."
)
_DECISIONS = {"accept": "accepted", "refer": "refer to a person"}


@dataclass
class Desk:
    """What this browser session was told, so that a rerun of the page asks nothing twice.

    `answers` and `plain` (what of the file a browser and the explainer can read) go by the SHA-256 of the file,
    `explanations` and `corrections` by the id of the prediction.
    """

    answers: dict[str, Answer] = field(default_factory=dict)
    plain: dict[str, bytes] = field(default_factory=dict)
    explanations: dict[str, Explanation | MedLoopError] = field(default_factory=dict)
    corrections: dict[str, Correction | MedLoopError] = field(default_factory=dict)
    author: str = ""

    def keep(self, digests: set[str]) -> None:
        """Forget the images that are no longer on the page."""
        self.answers = {digest: answer for digest, answer in self.answers.items() if digest in digests}
        self.plain = {digest: image for digest, image in self.plain.items() if digest in digests}
        kept = {answer.id for answer in self.answers.values() if isinstance(answer, Prediction)}
        self.explanations = {key: value for key, value in self.explanations.items() if key in kept}
        self.corrections = {key: value for key, value in self.corrections.items() if key in kept}


def show() -> None:
    st.title("Predict")
    st.caption("Ask the approved champion about one or more images, see why it answers so, and correct it.")
    desk: Desk = st.session_state.setdefault("desk", Desk())
    with guarded("Inference cannot be asked"):
        _show_served(connections().inference.served_model())
    files = st.file_uploader(_FORMATS, accept_multiple_files=True, key="images", help=_ABOUT_FORMATS)
    uploads = [Upload.of(file.name, file.getvalue()) for file in files]
    desk.keep({upload.digest for upload in uploads})
    if not uploads:
        st.info(
            "Upload an image to ask about it. It goes to your own services only, and is stored only if you correct "
            "the answer."
        )
        return
    waiting = [upload for upload in uploads if upload.digest not in desk.answers]
    if waiting:
        with st.spinner("Asking …"):
            desk.answers |= ask(connections().inference, waiting)
    chosen = _choose(uploads, desk.answers)
    _show_answer(desk, chosen)


def _show_served(served: ServedModel) -> None:
    if served.model is None:
        st.warning("Nothing is approved to answer yet. Approve a version on the page Models.")
    else:
        st.markdown(
            f"Answering now: **{plain(served.model.name)} version {plain(served.model.version)}** "
            f"({plain(served.alias)}; {len(served.classes)} classes)"
        )
    for what, reason in served.degraded.items():
        st.warning(plain(reason), title=f"Degraded: {plain(what)}")


def _choose(uploads: Sequence[Upload], answers: dict[str, Answer]) -> Upload:
    """The image to look at; with several, a table of all comes first."""
    if len(uploads) == 1:
        return uploads[0]
    st.dataframe(_overview(uploads, answers), hide_index=True, alt="Answers to all uploaded images")
    places = list(range(len(uploads)))
    place = st.selectbox("Look at", places, format_func=lambda i: f"{i + 1}. {uploads[i].name}", width=480)
    return uploads[place or 0]


def _overview(uploads: Sequence[Upload], answers: dict[str, Answer]) -> pd.DataFrame:
    rows = []
    for upload in uploads:
        answer = answers[upload.digest]
        if isinstance(answer, Prediction):
            label, probability = answer.label, percent(answer.probabilities[answer.label])
            decision = _DECISIONS[answer.decision]
            rows.append((upload.name, label, probability, decision, listed(answer.prediction_set), ""))
        else:
            rows.append((upload.name, "", "", "", "", answer.detail))
    columns = ["File", "Answer", "Probability", "Decision", "Cannot be ruled out", "Problem"]
    return pd.DataFrame(rows, columns=columns)


def _show_answer(desk: Desk, upload: Upload) -> None:
    answer = desk.answers[upload.digest]
    with st.container(border=True):
        st.text(upload.name)
        if isinstance(answer, MedLoopError):
            show_error(answer, "No answer for this image")
            if st.button("Ask again", key=f"again-{upload.digest}"):
                del desk.answers[upload.digest]
                st.rerun()
            return
        left, right = st.columns([2, 3], gap="large")
        with left:
            with guarded("This image cannot be shown"):
                st.image(viewable(_plain(desk, upload)), width=_IMAGE_PIXELS, alt="The uploaded image")
            _show_activation(answer.cam)
        with right:
            _show_prediction(answer)
    explanation = st.container(border=True)
    with st.container(border=True):
        _show_correction(desk, upload, answer)
    # Last, since it takes longest: answer and form stand on the page before the explainer is asked.
    with explanation:
        _show_explanation(desk, upload, answer)


def _plain(desk: Desk, upload: Upload) -> bytes:
    """The file itself, or what a DICOM file shows; raises what `plain_image` raises."""
    if upload.digest not in desk.plain:
        desk.plain[upload.digest] = plain_image(upload.data, connections().dicom)
    return desk.plain[upload.digest]


def _show_activation(cam: ClassActivation | None) -> None:
    if cam is None:
        st.caption("No class activation map: this model's architecture has none.")
        return
    st.image(base64.b64decode(cam.overlay), width=_IMAGE_PIXELS, alt="Class activation map")
    places = f"{len(cam.grid)} × {len(cam.grid[0])}"
    st.caption(
        plain(
            f"Class activation map: the redder an area, the more it adds to {cam.label}. It is coarse ({places}) "
            "and shows what the model used, not what is medically relevant."
        )
    )


def _show_prediction(answer: Prediction) -> None:
    st.subheader(f"{plain(answer.label)}, {percent(answer.probabilities[answer.label])}", anchor=False)
    _show_decision(answer)
    for warning in answer.warnings:
        st.warning(plain(warning), title="About this image")
    st.markdown(plain(ruled_out(answer)))
    st.markdown(plain(how_unlike(answer.outlier)))
    st.altair_chart(charts.probabilities(answer.probabilities, answer.prediction_set), alt="Probability of each class")
    model = answer.model
    st.caption(
        plain(
            f"{model.name} version {model.version}, {model.engine} {model.precision}, {timings(answer.milliseconds)}. "
            "Probabilities are calibrated on held-out images of the model's own data set; "
            "images of another kind than it was trained on can get confident wrong answers."
        )
    )


def _show_decision(answer: Prediction) -> None:
    """Calm where nothing speaks against the answer; where something does, the first thing to be seen."""
    if answer.decision == "accept":
        st.info("Nothing found that speaks against using this answer as a suggestion.", title="Accepted")
        return
    for reason in why_referred(answer):
        st.warning(plain(reason), title="Refer to a person")
    st.markdown("**What to do:** have someone who reads such images decide, and save their label below if it differs.")


def _show_explanation(desk: Desk, upload: Upload, answer: Prediction) -> None:
    st.subheader(f"Why {plain(answer.label)}?", anchor=False)
    if answer.id not in desk.explanations:
        model = answer.model
        with st.spinner("Explaining …", show_time=True):
            desk.explanations[answer.id] = outcome(
                lambda: connections().explainer.explain(
                    _plain(desk, upload), model=model.name, version=model.version, target=answer.label
                )
            )
    explanation = desk.explanations[answer.id]
    if isinstance(explanation, MedLoopError):
        show_error(explanation, "No explanation: the answer above does not depend on it")
        if st.button("Try again", key=f"explain-{answer.id}"):
            del desk.explanations[answer.id]
            st.rerun()
        return
    if explanation.model.bundle_digest != answer.model.bundle_digest:
        st.warning("This explains another bundle than the one that answered: compare with care.")
    *columns, last = st.columns(len(explanation.attributions) + 1, gap="large")
    last.markdown(HOW_TO_READ)
    for column, attribution in zip(columns, explanation.attributions, strict=True):
        with column:
            name = METHOD_NAMES.get(attribution.method, attribution.method)
            st.markdown(f"**{plain(name)}**")
            st.image(base64.b64decode(attribution.overlay), width=_IMAGE_PIXELS, alt=f"{name} overlay")
            for line in quality_lines(attribution.quality):
                st.caption(plain(line))


def _show_correction(desk: Desk, upload: Upload, answer: Prediction) -> None:
    st.subheader("Correct this answer", anchor=False)
    stored = desk.corrections.get(answer.id)
    if isinstance(stored, Correction):
        st.success(
            plain(f"Correction {stored.id}: {stored.label}, by {stored.author}; status: {stored.status}."),
            title="Correction stored",
        )
        st.caption("It waits for review, together with its image; accepted corrections become training data.")
        return
    if isinstance(stored, MedLoopError):
        show_error(stored, "The correction was not stored")
    with st.form(f"correct-{answer.id}", border=False):
        label = st.selectbox(
            "Right label", list(answer.probabilities), index=None, placeholder="Choose the class this image shows"
        )
        author = ask_name(f"author-{answer.id}", desk.author)
        comment = st.text_area(
            "Comment (optional)", max_chars=2000, height=80, placeholder="Why; nothing that could name a patient"
        )
        if not st.form_submit_button("Save correction", type="primary"):
            return
    desk.author = author
    desk.corrections[answer.id] = outcome(lambda: _save(upload, answer, label, author, comment.strip()))
    st.rerun()


def _save(upload: Upload, answer: Prediction, label: str | None, author: str, comment: str) -> Correction:
    if not label or not author:
        raise InvalidRequest("Choose the right label and give your name, then save again.")
    return connections().inference.correct(answer.id, label=label, author=author, image=upload.data, comment=comment)
