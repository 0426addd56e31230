import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from medloop.bundle import CARD, GOLDEN, MODEL, prediction_set, read_bundle
from medloop.errors import UntrustedModel
from medloop.testing import TINY_CLASSES, tiny_bundle


def test_a_sealed_bundle_reads_back_with_the_same_digest(tmp_path: Path) -> None:
    sealed = tiny_bundle(tmp_path)
    read = read_bundle(tmp_path)
    assert read.digest == sealed.digest
    assert read.card.classes == TINY_CLASSES


@pytest.mark.parametrize("name", [MODEL, GOLDEN, "reference.npz"])
def test_one_changed_byte_is_noticed(tmp_path: Path, name: str) -> None:
    tiny_bundle(tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UntrustedModel, match=name):
        read_bundle(tmp_path)


def test_a_changed_card_has_another_digest(tmp_path: Path) -> None:
    sealed = tiny_bundle(tmp_path)
    document = json.loads((tmp_path / CARD).read_text())
    document["temperature"] = 2.0
    (tmp_path / CARD).write_text(json.dumps(document))
    assert read_bundle(tmp_path).digest != sealed.digest


@pytest.mark.parametrize("files", [{}, {"../other": "0" * 64}])
def test_a_card_cannot_leave_out_the_model_or_name_files_elsewhere(tmp_path: Path, files: dict[str, str]) -> None:
    tiny_bundle(tmp_path)
    document = json.loads((tmp_path / CARD).read_text())
    document["files"] = {**document["files"], **files} if files else {}
    (tmp_path / CARD).write_text(json.dumps(document))
    with pytest.raises(UntrustedModel):
        read_bundle(tmp_path)


def test_a_folder_without_a_card_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(UntrustedModel, match="no bundle"):
        read_bundle(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ([], [], "holds no JSON object"),
        (["seed"], None, "lacks seed"),
        (["conformal", "threshold"], None, "lacks conformal.threshold"),
        (["conformal", "threshold"], 2, "a value of conformal.threshold that"),
        (["classes"], ["one"], "a value of classes that"),
        (["preparation", "size"], "large", "a value of preparation.size that"),
        (["preparation", "version"], 2, "a value of preparation.version that"),
        (["preparation", "gamma"], 2.2, "holds preparation.gamma, which this release does not know"),
        (["preparation", "window"], [5, 1], "a value of preparation that"),
        (["files", "model.onnx"], 7, "a value of files.model.onnx that"),
    ],
)
def test_what_is_wrong_with_a_card_is_told_by_name(tmp_path: Path, path: list[str], value: Any, says: str) -> None:
    tiny_bundle(tmp_path)
    document = json.loads((tmp_path / CARD).read_text())
    part = document
    for name in path[:-1]:
        part = part[name]
    if path and value is None:
        del part[path[-1]]
    elif path:
        part[path[-1]] = value
    (tmp_path / CARD).write_text(json.dumps(document if path else value))
    with pytest.raises(UntrustedModel, match=f"^bundle.json .*{re.escape(says)}") as caught:
        read_bundle(tmp_path)
    assert "Input should" not in caught.value.detail


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b'"' + b"x" * 100])
def test_a_card_that_is_no_json_is_told_in_one_sentence(tmp_path: Path, text: bytes) -> None:
    tiny_bundle(tmp_path)
    (tmp_path / CARD).write_bytes(text)
    with pytest.raises(UntrustedModel) as caught:
        read_bundle(tmp_path)
    assert caught.value.detail == "bundle.json holds no JSON object; register the version again."


def test_a_prediction_set_holds_what_cannot_be_ruled_out(tmp_path: Path) -> None:
    card = tiny_bundle(tmp_path, classes=("a", "b", "c"), threshold=0.8).card
    assert prediction_set(np.array([0.7, 0.25, 0.05], np.float32), card) == ["a", "b"]
    assert prediction_set(np.array([0.05, 0.9, 0.05], np.float32), card) == ["b"]


def test_an_answer_less_sure_than_calibration_images_were_is_no_set_of_one(tmp_path: Path) -> None:
    """Where nearly all calibration images had .99, a class of .6 is not what remains once the others are ruled out."""
    card = tiny_bundle(tmp_path, classes=("a", "b", "c"), threshold=0.01).card
    assert prediction_set(np.array([0.003, 0.002, 0.995], np.float32), card) == ["c"]
    assert prediction_set(np.array([0.39, 0.01, 0.6], np.float32), card) == ["c", "a"]
    assert prediction_set(np.array([0.4, 0.3, 0.3], np.float32), card) == ["a", "b", "c"]
    assert prediction_set(np.array([0.03, 0.96, 0.01], np.float32), card) == ["b"]
