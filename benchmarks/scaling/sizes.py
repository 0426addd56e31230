"""How many bytes a prediction is, made by the code that makes them in production."""

from dataclasses import dataclass
from pathlib import Path

import bson
import numpy as np
from medloop.bundle import Bundle, Card, Conformal, Outputs
from medloop.outliers import Geometry, OutlierModel
from medloop.schemas import ModelRef, new_id
from medloop.storage.records import Encoded, encode
from medloop.vision.phantoms import CLASSES
from medloop.vision.prepare import PreparationSpec
from medloop_inference.answer import Asked, Composer, record_of
from medloop_inference.frames import join_frames

from benchmarks.scaling.measured import Network
from benchmarks.serving.models import files

_HEADERS = 600
"""Of a request and its answer together: method, path, names, a bearer key, dates, an id; counted by hand."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes. `image` is the mean of the serving benchmark's files; `answer` what a caller is sent; `spooled` what it
    takes on the pod's disk; `document` in MongoDB before compression, its `_id` and declared fields with it, indexes
    without; `embedding` is the part of both that is the embedding, float16 in base64."""

    image: float
    answer: int
    spooled: int
    document: int
    embedding: int

    @property
    def on_the_wire(self) -> float:
        """Of a request and its answer."""
        return self.image + self.answer + _HEADERS


def measure(network: Network) -> Sizes:
    """The sizes of one prediction of six classes, with an outlier score, a request's id and a caller's name."""
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(len(CLASSES)), 1).astype(np.float32)
    embedding = random.normal(size=(1, network.embedding)).astype(np.float32)
    asked = Asked("0" * 64, {stage: random.random() / 100 for stage in ("decode", "queue", "network", "total")})
    (answer,) = _composer(network).compose([asked], Outputs(probabilities, embedding, None))
    record = record_of(answer, new_id(), "pacs-gateway")
    document = Encoded(record.decode())
    text, declared = encode("predictions", document)
    row = {"_id": document["id"], "revision": 1, "document": text, **declared}
    return Sizes(
        image=float(np.mean([len(image) for image, _ in files(network.name)])),
        answer=len(answer.json),
        spooled=len(join_frames([record])) + 4,  # the recorder's own length
        document=len(bson.encode(row)),
        embedding=len(document["embedding"]),
    )


def _composer(network: Network) -> Composer:
    card = Card(
        model=network.name.replace("_", "-"),
        classes=CLASSES,
        preparation=PreparationSpec(mode="L" if network.colours == 1 else "RGB", size=network.size),
        architecture="none",
        temperature=1.0,
        conformal=Conformal(coverage=0.95, threshold=0.9, images=100),
        operating_thresholds={},
        dataset_id="0" * 64,
        run_id="0" * 32,
        git_commit=None,
        seed=0,
        packages={},
    )
    ref = ModelRef(name=card.model, version="1", run_id=card.run_id, dataset_id=card.dataset_id, bundle_digest="0" * 64)
    wide = np.eye(network.embedding, 1, dtype=np.float32)
    one = np.ones((1, 1), np.float32)
    geometry = Geometry(np.zeros(network.embedding, np.float32), wide, one, one, np.array(1, np.float32))
    outliers = OutlierModel(geometry, np.linspace(0.5, 1.5, 100, dtype=np.float32), 1.4)
    return Composer(ref, Bundle(Path(), card, "0" * 64), outliers)
