"""A registry and an object store in which one version of model `tiny` went through the whole loop."""

from dataclasses import dataclass
from pathlib import Path

from medloop.data.leaks import LeakCount, LeakReport
from medloop.data.manifest import Manifest, Row, Split
from medloop.registry import CHALLENGER, CHAMPION, PREVIOUS, Registry, Version
from medloop.schemas import (
    ClassReport,
    Estimate,
    EvaluationReport,
    ExplainedBy,
    ExplainedImage,
    ExplanationIndex,
    Mistake,
    ModelRef,
    ServedReport,
)
from medloop.storage.objects import ObjectStore, open_objects
from medloop.testing import register_bundle, tiny_bundle

from .fakes import CLASSES, PNG, QUALITY


def make_manifest(objects: ObjectStore) -> Manifest:
    """A stored data set version of 40 images with one exact leak."""
    splits: tuple[Split, ...] = ("train", "train", "val", "calibration", "test")
    rows = tuple(
        Row(
            byte_hash=f"{i:064x}",
            # Images 0 and 4 hold the same pixels: one for training, one for the test.
            pixel_hash=f"{0 if i == 4 else i:064x}",
            label=CLASSES[i % 2],
            split=splits[i % 5],
        )
        for i in range(40)
    )
    made = Manifest("tiny", CLASSES, rows)
    made.save(objects)
    count = LeakCount(exact=1, near=1)
    leaks = LeakReport(
        distance=2, images=40, exact=1, near=1, by_split={"train/test": count}, by_class={"dark": count}, examples=()
    )
    objects.put(f"datasets/{made.id}/leaks.json", leaks.to_json().encode())
    return made


@dataclass(frozen=True)
class Studio:
    """An MLflow and an object store with three versions of model `tiny`, only ever read: 1 was champion before, 2 is,
    3 waits; 3 was trained, evaluated and explained."""

    database: Path
    objects: Path
    versions: list[Version]
    manifest: Manifest

    @property
    def tracking_uri(self) -> str:
        return f"sqlite:///{self.database}"


def build(folder: Path, database: Path) -> Studio:
    """A studio under `folder`, in the empty MLflow `database`."""
    registry = Registry(f"sqlite:///{database}")
    registry.client.create_experiment("test", artifact_location=(folder / "artifacts").as_uri())
    manifest = make_manifest(open_objects((folder / "objects").as_uri()))
    bundles = [tiny_bundle(folder / f"{n}", bias=float(n), dataset_id=manifest.id) for n in (1, 2, 3)]
    versions = [register_bundle(registry, bundle) for bundle in bundles]
    for alias, version in ((PREVIOUS, "1"), (CHAMPION, "2"), (CHALLENGER, "3")):
        registry.set_alias("tiny", alias, version)
    finish_run(registry, versions[2], manifest, folder / "files")
    return Studio(database, folder / "objects", versions, manifest)


def finish_run(registry: Registry, version: Version, manifest: Manifest, folder: Path) -> None:
    """Give a run what trainer and evaluator leave in it."""
    from mlflow.entities import Metric, Param

    curves = {"train_loss": [0.9, 0.5, 0.2], "val_loss": [1.0, 0.6, 0.4], "val_accuracy": [0.5, 0.8, 0.9]}
    metrics = [Metric(name, v, 1000 + i, i) for name, values in curves.items() for i, v in enumerate(values)]
    report = evaluation_report(version, manifest)
    for name, estimate in report.metrics.items():
        ends = (("", estimate.value), ("_low", estimate.low), ("_high", estimate.high))
        metrics += [Metric(f"test_{name}{end}", value, 2000, 0) for end, value in ends]
    registry.client.log_batch(version.run_id, metrics=metrics, params=[Param("architecture", "tiny")])
    target = folder / "evaluation" / "test"
    (target / "misclassified").mkdir(parents=True)
    (target / "report.json").write_text(report.model_dump_json())
    (target / "misclassified" / "00_dark_as_bright.png").write_bytes(PNG)
    lines = ["row,image_hash,label,predicted,p_dark,p_bright", "0,aa,dark,bright,0.1,0.9", "1,bb,dark,dark,0.7,0.3"]
    (target / "predictions.csv").write_text("\n".join(lines) + "\n")
    explained = folder / "explanations"
    explained.mkdir()
    (explained / "index.json").write_text(explanation_index(report.model).model_dump_json())
    for name in ("00.png", "00_ig.png", "00_shap.png"):
        (explained / name).write_bytes(PNG)
    registry.client.log_artifacts(version.run_id, str(folder))


def explanation_index(ref: ModelRef) -> ExplanationIndex:
    image = ExplainedImage(
        row=0,
        image_hash="a" * 64,
        label="dark",
        predicted="bright",
        probability=0.9,
        original="00.png",
        attributions=[
            ExplainedBy(method="integrated-gradients", overlay="00_ig.png", quality=QUALITY),
            ExplainedBy(method="shap", overlay="00_shap.png", quality=QUALITY),
        ],
    )
    quality = {"integrated-gradients": QUALITY, "shap": QUALITY}
    return ExplanationIndex(model=ref, split="test", images=[image], quality=quality)


def evaluation_report(version: Version, manifest: Manifest) -> EvaluationReport:
    ref = ModelRef(
        name=version.model,
        version=version.version,
        run_id=version.run_id,
        dataset_id=manifest.id,
        bundle_digest="d" * 64,
    )
    return EvaluationReport(
        model=ref,
        split="test",
        images=8,
        classes=list(CLASSES),
        metrics={
            "accuracy": Estimate(value=0.875, low=0.529, high=0.978, method="wilson"),
            "auc": Estimate(value=0.9375, low=0.7, high=1.0, method="bootstrap"),
            "ece": Estimate(value=0.0421, low=0.01, high=0.2, method="bootstrap"),
        },
        per_class=[
            ClassReport(label="dark", support=4, precision=1.0, recall=0.75, f1=0.857, auc=0.9375),
            ClassReport(label="bright", support=4, precision=0.8, recall=1.0, f1=0.889, auc=None),
        ],
        confusion=[[3, 1], [0, 4]],
        worst=[Mistake(row=0, image_hash="a" * 64, label="dark", predicted="bright", probability=0.9)],
        leaks={"exact": 2, "near": 2, "distance": 2},
        served=ServedReport(
            nominal_coverage=0.95,
            calibration_images=8,
            figures={
                "coverage": Estimate(value=1.0, low=0.676, high=1.0, method="wilson"),
                "set_size": Estimate(value=1.75, low=1.4, high=1.93, method="wilson"),
                "referred": Estimate(value=0.75, low=0.409, high=0.929, method="wilson"),
            },
            class_coverage={"dark": Estimate(value=1.0, low=0.51, high=1.0, method="wilson")},
            set_sizes=[0, 2, 6],
        ),
    )
