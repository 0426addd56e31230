"""What travels between services and what lies in records: one place, versioned.

Requests (`…Create`) forbid unknown fields, so that a typo is told at once; answers ignore them when read, so that an
older client can talk to a newer service. Times are UTC; probabilities and rates are fractions in [0, 1].
"""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from uuid6 import uuid7

SCHEMA_VERSION = 1

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
"""A model's or data set lineage's name: lower case, so that it is the same in paths, buckets and MLflow."""
Person = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]
Version = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
Fraction = Annotated[float, Field(ge=0, le=1)]


def now() -> datetime:
    return datetime.now(UTC)


def new_id() -> str:
    """A fresh UUIDv7 (RFC 9562): sorts by time."""
    return str(uuid7())


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Answer(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    schema_version: int = SCHEMA_VERSION


class Problem(BaseModel):
    """Problem details (RFC 9457). `code` repeats the machine-readable end of `type`; more members may follow."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: str
    title: str
    status: int
    detail: str
    code: str
    instance: str | None = None
    request_id: str | None = None


class ModelRef(BaseModel):
    """Exactly which model answered."""

    model_config = ConfigDict(frozen=True)

    name: str
    version: str
    run_id: str
    dataset_id: str
    bundle_digest: str
    engine: str = "onnxruntime"
    precision: str = "float32"


class Outlier(BaseModel):
    """How unlike the training images an image is: `score` is a distance in embedding space (≥ 0, see
    `medloop.outliers`), `percentile` the share of training images, in percent, that lie nearer. `threshold` is the
    score beyond which the answer is referred; None where too few calibration images were there to set one."""

    model_config = ConfigDict(frozen=True)

    score: float
    percentile: float = Field(ge=0, le=100)
    threshold: float | None


class ClassActivation(BaseModel):
    """Where `label` comes from (Zhou et al. 2016): `grid` [h, w] in logit units, whose mean is what the features add to
    the class; `overlay` is a PNG, base64, of the prepared image with the positive part laid over it."""

    model_config = ConfigDict(frozen=True)

    label: str
    grid: list[list[float]]
    overlay: str


ReferReason = Literal["ambiguous", "unlike-training"]


class Prediction(Answer):
    """One answer to one image. `image_hash` is the SHA-256 of the bytes that were sent."""

    id: str = Field(default_factory=new_id)
    created_at: datetime = Field(default_factory=now)
    model: ModelRef
    image_hash: str
    frame: int | None = None
    """Which frame of a multi-frame DICOM, counted from 1."""
    label: str
    probabilities: dict[str, float]
    prediction_set: list[str]
    """Classes that split conformal prediction cannot rule out at `coverage` (Vovk et al. 2005), likeliest first."""
    coverage: float
    outlier: Outlier | None = None
    """None where the bundle holds no statistics of its training images."""
    decision: Literal["accept", "refer"] = "accept"
    reasons: list[ReferReason] = []
    """Why the answer is referred to a person: more than one class cannot be ruled out (`ambiguous`), or the image is
    further from the training images than nearly all calibration images are (`unlike-training`)."""
    cam: ClassActivation | None = None
    """Where it was asked for, and the architecture has one."""
    warnings: list[str] = []
    """What a person should know about the image itself, such as burned-in text in DICOM."""
    image_stored: bool = False
    """Whether the image is kept, so that a correction need not bring it."""
    milliseconds: dict[str, float]


class PredictionItem(Answer):
    """One file of a multipart request: answered or refused on its own; `index` is its place in the request."""

    index: int
    prediction: Prediction | None = None
    problem: Problem | None = None


class PredictionBatch(Answer):
    items: list[PredictionItem]


class Correction(Answer):
    """A person's label for a predicted image, which lies in objects under `images/<2 hex>/<image_hash>`.

    It was made of the file whose SHA-256 is `file_hash`, and of its frame `frame`, counted from 1, where that is a
    multi-frame DICOM. That this is the predicted file is certain where `version` is set: the prediction was known.
    """

    id: str
    created_at: datetime = Field(default_factory=now)
    prediction_id: str
    model: str | None
    version: str | None
    predicted_label: str | None
    label: str
    image_hash: str
    file_hash: str | None = None
    frame: int | None = None
    author: str
    comment: str = ""
    status: Literal["pending", "accepted", "rejected"] = "pending"


class RefusedVersion(BaseModel):
    version: str
    reason: str
    at: datetime = Field(default_factory=now)


class EngineCheck(BaseModel):
    """How far an engine and precision other than float32 on ONNX Runtime lie from it, on `images` images of `source`.
    `agreement` is the share of equal labels; `speedup` the ratio of images a second, where it was measured."""

    model_config = ConfigDict(frozen=True)

    engine: str
    precision: str
    source: Literal["golden", "calibration"]
    images: int
    max_difference: float
    agreement: float
    speedup: float | None = None


class Shadow(BaseModel):
    """How the challenger does on the sampled `share` of traffic that it is asked about beside the champion."""

    model_config = ConfigDict(frozen=True)

    model: ModelRef | None
    share: Fraction
    compared: int
    disagreements: int
    skipped: int
    """Sampled, but dropped because answering people came first."""
    problem: str | None = None


class Disagreement(Answer):
    """An image that champion and challenger (both versions of `model`) give different labels. Its record has the id
    of the prediction."""

    prediction_id: str
    created_at: datetime = Field(default_factory=now)
    model: str
    champion: str
    challenger: str
    image_hash: str
    champion_label: str
    champion_probabilities: dict[str, float]
    challenger_label: str
    challenger_probabilities: dict[str, float]


class ServedModel(Answer):
    """What inference answers with now, what it refused to load and why, and which neighbours are out of reach."""

    model: ModelRef | None
    classes: list[str] = []
    preparation: dict[str, Any] = {}
    alias: str = "champion"
    loaded_at: datetime | None = None
    previous: ModelRef | None = None
    """Kept in memory, so that a rollback to it is a swap."""
    checks: list[EngineCheck] = []
    """Where another engine or precision than float32 on ONNX Runtime answers: what it was checked against."""
    shadow: Shadow | None = None
    refused: list[RefusedVersion] = []
    degraded: dict[str, str] = {}


class Estimate(BaseModel):
    """A figure with its 95 % interval and how that was found (`wilson`, `bootstrap`, `cluster-wilson`,
    `cluster-bootstrap`)."""

    model_config = ConfigDict(frozen=True)

    value: float
    low: float
    high: float
    method: str


class ClassReport(BaseModel):
    model_config = ConfigDict(frozen=True)

    label: str
    support: int
    precision: float
    recall: float
    f1: float
    auc: float | None


class Mistake(BaseModel):
    """A misclassified image; `row` counts rows of the manifest."""

    model_config = ConfigDict(frozen=True)

    row: int
    image_hash: str
    label: str
    predicted: str
    probability: float
    """What the model gave to the class it wrongly named."""


class ServedReport(BaseModel):
    """What people would be told about the images of a split: prediction sets and referrals, as inference makes them.

    `figures` has coverage (the right class is in the set), set_size (the mean), referred, referred_ambiguous,
    referred_unlike_training, accepted_accuracy and referred_accuracy. What is not defined is left out: the accuracy of
    no image, the coverage of a class without images, referred_unlike_training without an outlier threshold.
    """

    model_config = ConfigDict(frozen=True)

    nominal_coverage: float
    calibration_images: int
    """How many images the conformal threshold rests on."""
    figures: dict[str, Estimate]
    class_coverage: dict[str, Estimate]
    set_sizes: list[int]
    """`[n]` counts images with n classes in their set, n from 0 to K."""


class EvaluationCreate(Request):
    model: Name
    version: Version
    split: Literal["val", "calibration", "test"] = "test"


class EvaluationReport(Answer):
    """How a model version does on one split: `metrics` has accuracy, precision, recall, f1 (macro), auc (macro
    one-versus-rest), ece (15 equal-width bins), nll and brier; `confusion[i][j]` counts true class i called j."""

    model: ModelRef
    split: str
    images: int
    classes: list[str]
    metrics: dict[str, Estimate]
    per_class: list[ClassReport]
    confusion: list[list[int]]
    worst: list[Mistake]
    leaks: dict[str, int] = {}
    served: ServedReport | None = None
    """None in a report that was made before there was this part."""
    created_at: datetime = Field(default_factory=now)


class EngineCheckCreate(Request):
    """Ask how far `engine` in `precision` lies from float32 on ONNX Runtime on the calibration split."""

    model: Name
    version: Version
    engine: str
    precision: str


class EngineVerdict(Answer):
    """What the evaluator found of one engine and precision on the calibration split of `dataset_id`. It speaks of the
    bundle and the engine's package version it names, and of nothing else; `cpu` is where it was found."""

    id: str = Field(default_factory=new_id)
    created_at: datetime = Field(default_factory=now)
    model: str
    version: str
    bundle_digest: str
    dataset_id: str
    engine_version: str
    cpu: str
    check: EngineCheck
    passed: bool
    reason: str = ""
    """Why it did not pass."""


class ExplanationCreate(Request):
    """Ask for explanations of the data set's own images: of `rows`, or of `images` chosen from the split."""

    model: Name
    version: Version
    split: Literal["val", "calibration", "test"] = "test"
    rows: list[int] | None = Field(default=None, max_length=256)
    images: int = Field(default=12, ge=1, le=256)


class Attribution(BaseModel):
    """One method's reason for one image. `overlay` is a PNG, base64; `quality` says how far it can be trusted."""

    method: Literal["integrated-gradients", "shap"]
    overlay: str
    values: list[list[float]]
    """[S, S] attribution to the explained class, in probability units, summed over channels."""
    quality: dict[str, float]


class Explanation(Answer):
    """Why the model gave `target` its probability for one image."""

    model: ModelRef
    image_hash: str
    target: str
    probability: float
    attributions: list[Attribution]


class ExplainedBy(BaseModel):
    """One method's reason for one image of the data set; `overlay` is a PNG beside the index."""

    model_config = ConfigDict(frozen=True)

    method: Literal["integrated-gradients", "shap"]
    overlay: str
    quality: dict[str, float]


class ExplainedImage(BaseModel):
    """Why the model called an image `predicted`; `row` counts rows of the manifest, `original` is a PNG of what the
    network saw."""

    model_config = ConfigDict(frozen=True)

    row: int
    image_hash: str
    label: str
    predicted: str
    probability: float
    original: str
    attributions: list[ExplainedBy]


class ExplanationIndex(Answer):
    """`explanations/index.json` among the artifacts of the version's run: what lies there. `quality` has each method's
    mean figures; the values themselves are in `values.npz`: `rows` int64 [N], and for each method, with `_` for `-`,
    float16 [N, S, S]."""

    model: ModelRef
    split: str
    images: list[ExplainedImage]
    quality: dict[str, dict[str, float]]
    created_at: datetime = Field(default_factory=now)


class GateDecision(Answer):
    """The statistical comparison of challenger and champion on the frozen test split; it never promotes by itself."""

    id: str = Field(default_factory=new_id)
    created_at: datetime = Field(default_factory=now)
    model: str
    challenger: str
    champion: str | None
    dataset_id: str
    outcome: Literal["pass", "fail", "no-champion"]
    reason: str
    figures: dict[str, float] = {}


class GateCreate(Request):
    model: Name
    version: Version


class ApprovalCreate(Request):
    model: Name
    version: Version
    approver: Person
    bootstrap: bool = False
    """The demo's first champion: signed as `bootstrap`, not as a person, and refused where a champion exists."""
    override: str | None = Field(default=None, max_length=2000)
    """Why this version is approved although the gate failed."""
    champion: Version | None = None
    """The champion that the person saw: refused when it is another one by now."""


class RollbackCreate(Request):
    model: Name
    approver: Person
    reason: str = Field(default="", max_length=2000)
    champion: Version | None = None
    """The champion that the person wants to leave; saying so makes it safe to ask again."""


class Approval(Answer):
    """The evaluator's Ed25519 signature (RFC 8032) over everything else in this document, in canonical JSON."""

    id: str = Field(default_factory=new_id)
    created_at: datetime = Field(default_factory=now)
    sequence: int = Field(ge=1)
    """Counts the approvals of one model, so that an old one cannot be played back over a newer one."""
    action: Literal["approve", "rollback", "bootstrap"]
    model: str
    version: str
    bundle_digest: str
    decision_id: str
    approver: str
    reason: str = ""
    key_id: str
    signature: str = ""


class TimelineEntry(Answer):
    """One change of what production answers with."""

    approval: Approval
    decision: GateDecision | None


class JobPublic(Answer):
    """A long evaluation or explanation: ask again until `status` is `succeeded` or `failed`."""

    id: str
    type: str
    status: Literal["queued", "running", "succeeded", "failed"]
    progress: dict[str, Any] = {}
    result: dict[str, Any] | None = None
    problem: dict[str, Any] | None = None
    created_at: datetime
    updated_at: datetime
