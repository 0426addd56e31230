"""Tables made from evaluations."""

import pytest
from medloop.errors import InvalidRequest
from medloop.schemas import ClassReport, Estimate, EvaluationReport, ModelRef, ServedReport
from medloop_dashboard.reports import (
    class_table,
    evaluated_splits,
    mistake_pictures,
    read_explanations,
    read_report,
    reliability_table,
    served_notes,
)
from medloop_dashboard.runs import ArtifactFile


def files(*paths: str) -> list[ArtifactFile]:
    return [ArtifactFile(path, 1) for path in paths]


def test_finds_evaluated_splits_test_first() -> None:
    found = files(
        "bundle/report.json", "evaluation/val/report.json", "evaluation/test/report.json", "evaluation/x.json"
    )
    assert evaluated_splits(found) == ["test", "val"]
    assert evaluated_splits([]) == []


def test_pairs_pictures_with_mistakes_by_number() -> None:
    folder = "evaluation/test/misclassified"
    found = files(
        f"{folder}/00_a_as_b.png",
        f"{folder}/11_b_as_a.png",
        f"{folder}/notes.txt",
        "evaluation/val/misclassified/01_a_as_b.png",
    )
    assert mistake_pictures(found, "test") == {0: f"{folder}/00_a_as_b.png", 11: f"{folder}/11_b_as_a.png"}


def test_reliability_counts_each_image_once_in_its_bin() -> None:
    rows = [("NA", "NA", 1.0, 0.0), ("NA", "007", 0.01, 0.99), ("007", "007", 0.45, 0.55)]
    lines = ["row,image_hash,label,predicted,p_NA,p_007"]
    lines += [f"{i},h,{label},{called},{a},{b}" for i, (label, called, a, b) in enumerate(rows)]
    table = reliability_table("\n".join(lines).encode())
    assert table["images"].tolist() == [1, 2]
    assert table["confidence"].tolist() == pytest.approx([0.55, 0.995])
    assert table["accuracy"].tolist() == pytest.approx([1.0, 0.5])
    assert ((table["low"] < table["accuracy"]) & (table["accuracy"] <= table["high"])).all()


def report(method: str) -> EvaluationReport:
    rows = [
        ClassReport(label="a", support=4, precision=0.75, recall=0.75, f1=0.75, auc=0.9),
        ClassReport(label="b", support=2, precision=0.5, recall=0.5, f1=0.5, auc=0.9),
        ClassReport(label="absent", support=0, precision=0.0, recall=0.0, f1=0.0, auc=None),
    ]
    return EvaluationReport(
        model=ModelRef(name="m", version="1", run_id="r", dataset_id="d", bundle_digest="b"),
        split="test",
        images=6,
        classes=[row.label for row in rows],
        metrics={"accuracy": Estimate(value=0.6, low=0.2, high=0.9, method=method)},
        per_class=rows,
        confusion=[[3, 1, 0], [1, 1, 0], [0, 0, 0]],
        worst=[],
    )


def test_shares_by_class_have_intervals_where_images_are_independent() -> None:
    table = class_table(report("wilson"))
    assert table["Recall"].tolist() == ["75.0 % (30.1 % to 95.4 %)", "50.0 % (9.5 % to 90.5 %)", "not defined"]
    assert class_table(report("cluster-bootstrap"))["Precision"].tolist() == ["75.0 %", "50.0 %", "not defined"]


def test_sets_and_referrals_are_shown_with_what_speaks_against_them() -> None:
    def notes(high: float, split: str = "test", **more: Estimate) -> str:
        coverage = Estimate(value=0.8, low=0.7, high=high, method="wilson")
        served = ServedReport(
            nominal_coverage=0.9,
            calibration_images=30,
            figures={"coverage": coverage, **more},
            class_coverage={"a": coverage},
            set_sizes=[0, 4, 0, 2],
        )
        return " ".join(served_notes(report("wilson").model_copy(update={"served": served, "split": split})))

    assert "90 %, by a threshold that 30 calibration images set" in notes(0.95)
    assert "Images by size of their set: 1: 4, 3: 2." in notes(0.95)
    assert "less often than" not in notes(0.95)
    assert "less often than 90 %" in notes(0.85)
    assert "less often than" not in notes(0.85, split="calibration")
    assert "says nothing about new ones" in notes(0.85, split="calibration")
    assert "no outlier threshold" in notes(0.95)
    rate = Estimate(value=0.0, low=0.0, high=0.4, method="wilson")
    assert "no outlier threshold" not in notes(0.95, referred_unlike_training=rate)


def test_an_older_report_has_no_sets_and_says_so() -> None:
    assert "evaluate the version again" in served_notes(report("wilson"))[0]
    assert "In the set" not in class_table(report("wilson"))


@pytest.mark.parametrize(
    "document", [b"", b"row,label\n1,a\n", b"label,predicted\na,a\n", b"label,predicted,p_a\na,a,x\n"]
)
def test_other_files_are_refused(document: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"predictions\.csv"):
        reliability_table(document)


def test_other_reports_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="evaluate again"):
        read_report(b'{"schema_version": 1}')
    with pytest.raises(InvalidRequest, match="explain the version again"):
        read_explanations(b"[]")
