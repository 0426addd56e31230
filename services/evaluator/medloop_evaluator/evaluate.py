"""The evaluation of one model version on one split: answers, report, artifacts of the version's MLflow run."""

import numpy as np
from medloop.bundle import Bundle
from medloop.data.cache import open_cache
from medloop.data.leaks import LeakReport
from medloop.data.manifest import Manifest, Split, dataset_key, load_manifest
from medloop.errors import NotFound, UntrustedModel
from medloop.registry import TAG_DATASET, TAG_DIGEST, Registry, Version, fetch_bundle
from medloop.schemas import EvaluationReport, Mistake, ModelRef
from medloop.settings import HomeSettings
from medloop.storage.objects import ObjectStore
from numpy.typing import NDArray

from medloop_evaluator.answers import Answers, Progress, evaluation_key, read_or_compute
from medloop_evaluator.artifacts import publish
from medloop_evaluator.metrics import Scorer, confusion, estimates, per_class, worst
from medloop_evaluator.resample import Resampling, clusters
from medloop_evaluator.served import make_served

WORST_MISTAKES = 24
"""How many misclassified images are reported, with their pictures: what a person looks through in a minute."""
REPORT = "report.json"


class Evaluator:
    """Judges model versions; what it finds is kept in objects and in MLflow."""

    def __init__(self, registry: Registry, objects: ObjectStore, home: HomeSettings) -> None:
        self.registry = registry
        self.objects = objects
        self.home = home

    def evaluate(self, version: Version, split: Split, progress: Progress) -> EvaluationReport:
        """The report on `version`, made unless there is one with all that this release reports.

        Raises UntrustedModel for a bundle that is not the registered one, NotFound when its data set is gone.
        """
        if (made := self._made(version, split)) is not None:
            return made
        bundle = fetch_bundle(self.registry, version, self.home.bundles_dir)
        manifest = load_manifest(self.objects, bundle.card.dataset_id)
        answers = self.answers(bundle, manifest, split, progress)
        progress("metrics", 0, 1)
        scorer = score(answers, manifest, bundle)
        report = make_report(version, bundle, split, manifest, answers, scorer, self._leaks(manifest.id))
        progress("artifacts", 0, 1)
        images = open_cache(manifest, bundle.card.preparation, self.objects, self.home.cache_dir).images
        publish(self.registry, report, manifest, answers, scorer, images)
        # Last: a report that can be read has all of its artifacts in MLflow.
        key = evaluation_key(bundle.digest, manifest.id, split, REPORT)
        self.objects.put(key, report.model_dump_json().encode())
        return report

    def report(self, version: Version, split: Split) -> EvaluationReport:
        """The report that was made before; raises NotFound when there is none."""
        digest, dataset_id = (version.tags.get(tag, "unnamed") for tag in (TAG_DIGEST, TAG_DATASET))
        try:
            document = self.objects.get(evaluation_key(digest, dataset_id, split, REPORT))
        except NotFound as exc:
            raise NotFound(
                f"{version.model} version {version.version} was not evaluated on {split} yet; "
                f"run: medloop evaluate {version.model} {version.version}"
            ) from exc
        return EvaluationReport.model_validate_json(document)

    def reported(self, version: Version, split: Split) -> bool:
        """Whether there is a report with all that this release reports."""
        return self._made(version, split) is not None

    def _made(self, version: Version, split: Split) -> EvaluationReport | None:
        try:
            report = self.report(version, split)
        except NotFound:
            return None
        return None if report.served is None else report

    def answers(self, bundle: Bundle, manifest: Manifest, split: Split, progress: Progress) -> Answers:
        """What the bundle's network answers on `split` of any version of its lineage."""
        return read_or_compute(bundle, manifest, split, self.objects, self.home.cache_dir, progress)

    def _leaks(self, dataset_id: str) -> dict[str, int]:
        try:
            report = LeakReport.from_json(self.objects.get(dataset_key(dataset_id, "leaks.json")))
        except NotFound:
            return {}  # a data set that was not built by us has no leak report
        return {"exact": report.exact, "near": report.near, "distance": report.distance}


def score(answers: Answers, manifest: Manifest, bundle: Bundle) -> Scorer:
    """The answers held against the manifest's labels, in the card's class order."""
    if set(manifest.classes) != set(bundle.card.classes):
        raise UntrustedModel(
            f"The model's classes are not those of data set {manifest.name}: train it on this data set, or evaluate "
            "another version."
        )
    number = {label: k for k, label in enumerate(bundle.card.classes)}
    labels: NDArray[np.int64] = np.array([number[manifest.rows[row].label] for row in answers.rows])
    return Scorer(answers.probabilities, labels, bundle.card.classes)


def make_report(
    version: Version,
    bundle: Bundle,
    split: Split,
    manifest: Manifest,
    answers: Answers,
    scorer: Scorer,
    leaks: dict[str, int],
) -> EvaluationReport:
    """All figures of one evaluation; `scorer` holds the classes in the order of the answers' columns."""
    resampling = Resampling(scorer.labels, clusters([manifest.rows[row].group for row in answers.rows]))
    classes = scorer.classes
    return EvaluationReport(
        model=_ref(version, bundle),
        split=split,
        images=len(answers.rows),
        classes=list(classes),
        metrics=estimates(scorer, resampling),
        per_class=per_class(scorer),
        confusion=confusion(scorer),
        worst=[
            Mistake(
                row=int(answers.rows[i]),
                image_hash=manifest.rows[answers.rows[i]].byte_hash,
                label=classes[scorer.labels[i]],
                predicted=classes[scorer.predicted[i]],
                probability=float(scorer.confidence[i]),
            )
            for i in worst(scorer, WORST_MISTAKES)
        ],
        leaks=leaks,
        served=make_served(answers, scorer, bundle, resampling),
    )


def _ref(version: Version, bundle: Bundle) -> ModelRef:
    return ModelRef(
        name=version.model,
        version=version.version,
        run_id=version.run_id,
        dataset_id=bundle.card.dataset_id,
        bundle_digest=bundle.digest,
    )
