"""The two questions: why this answer to one image, and to images of the version's own data set."""

import base64
import hashlib
import threading
from collections.abc import Callable, Sequence

import numpy as np
from medloop.data.manifest import Manifest, load_manifest
from medloop.errors import InvalidRequest
from medloop.registry import Version
from medloop.schemas import Attribution, Explanation, ExplanationCreate, ExplanationIndex
from medloop.storage.objects import ObjectStore
from medloop.vision.overlay import overlay
from medloop.vision.prepare import prepare

from medloop_explainer.artifacts import ExplainedSet, publish
from medloop_explainer.methods import METHODS, Method
from medloop_explainer.models import Models, take_in_turn

Progress = Callable[[str, int, int], None]
"""Called with a step's name, how much is done, and how much there is."""

_DECIMALS = 7  # of values in JSON: a millionth of the probability is nothing, and digits are most of the answer


class Explainer:
    """Explains one image at a time: torch takes every core for each, so two at once would both be slower. What a set
    needs, which nobody waits for, is read from `objects`, for one image from `prompt_objects`."""

    def __init__(self, models: Models, objects: ObjectStore, prompt_objects: ObjectStore) -> None:
        self.models = models
        self.objects = objects
        self.prompt_objects = prompt_objects
        self._turn = threading.Lock()

    def explain(self, version: Version, data: bytes, target: str | None, methods: Sequence[Method]) -> Explanation:
        """Why `version` gives class `target`, by default the predicted one, its probability for the image file
        `data`. Raises InvalidImage for what is none, InvalidRequest for an unknown class."""
        from medloop_explainer.reasons import probabilities, reasons

        model = self.models.open(version, self.prompt_objects)
        classes = model.bundle.card.classes
        if target is not None and target not in classes:
            raise InvalidRequest(f"The model knows no class {target!r}; its classes are {', '.join(classes)}.")
        pixels = prepare(data, model.bundle.card.preparation)
        with self._turn:
            said = probabilities(model, pixels)
            number = int(said.argmax()) if target is None else classes.index(target)
            found = reasons(model, pixels, number, methods)
        return Explanation(
            model=model.ref,
            image_hash=hashlib.sha256(data).hexdigest(),
            target=classes[number],
            probability=float(said[number]),
            attributions=[
                Attribution(
                    method=reason.method,
                    overlay=base64.b64encode(overlay(pixels, reason.patches)).decode(),
                    values=np.round(reason.values.astype(np.float64), _DECIMALS).tolist(),
                    quality=reason.quality,
                )
                for reason in found
            ],
        )

    def explain_set(self, request: ExplanationCreate, progress: Progress) -> ExplanationIndex:
        """Explain the predicted class of images of the version's data set, as artifacts of its MLflow run.

        Raises InvalidRequest for rows that the data set does not have, or a split without images.
        """
        from medloop_explainer.reasons import probabilities, reasons

        version = self.models.find(request.model, request.version)
        model = self.models.open(version, self.objects)
        manifest = load_manifest(self.objects, model.bundle.card.dataset_id)
        rows = _chosen(manifest, request)
        found = ExplainedSet(model.ref, request.split, model.bundle.card.classes)
        for done, number in enumerate(rows):
            progress("explain", done, len(rows))
            row = manifest.rows[number]
            pixels = prepare(self.objects.get(row.location), model.bundle.card.preparation)
            with self._turn:
                said = probabilities(model, pixels)
                found.add(number, row, pixels, said, reasons(model, pixels, int(said.argmax()), METHODS))
        progress("artifacts", len(rows), len(rows))
        return publish(self.models.registry, found)


def _chosen(manifest: Manifest, request: ExplanationCreate) -> list[int]:
    if request.rows is None:
        chosen = take_in_turn(manifest, request.split, request.images)
        if not chosen:
            raise InvalidRequest(f"Data set {manifest.name} has no image in its {request.split} split.")
        return chosen
    outside = [row for row in request.rows if not 0 <= row < len(manifest.rows)]
    if outside or not request.rows:
        raise InvalidRequest(f"Rows of data set {manifest.name} are 0 to {len(manifest.rows) - 1}; name some of those.")
    return request.rows
