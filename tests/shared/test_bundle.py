import json
from pathlib import Path

import numpy as np
import pytest
from medloop.bundle import CARD, GOLDEN, MODEL, Golden, Network, prediction_set, read_bundle, write_card
from medloop.errors import UntrustedModel
from medloop.testing import TINY_CLASSES, tiny_bundle, tiny_network, tiny_probabilities


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


def test_the_network_answers_as_known_and_each_row_for_itself(tmp_path: Path) -> None:
    network = tiny_network(tmp_path, bias=0.5)
    images = np.random.default_rng(1).integers(0, 256, (7, 16, 16, 1), dtype=np.uint8)
    together = network.run(images).probabilities
    expected = [tiny_probabilities(image, 2, 0.5) for image in images]
    np.testing.assert_allclose(together, expected, atol=1e-6)
    alone = np.concatenate([network.run(image[None]).probabilities for image in images])
    np.testing.assert_allclose(alone, together, atol=1e-6)


def test_golden_inputs_pass_on_the_machine_that_made_them(tmp_path: Path) -> None:
    assert tiny_network(tmp_path).check_golden() < 1e-5


@pytest.mark.parametrize("field", ["pixels", "probabilities"])
def test_golden_inputs_with_other_answers_are_refused(tmp_path: Path, field: str) -> None:
    bundle = tiny_bundle(tmp_path)
    golden = bundle.golden
    pixels, probabilities = golden.pixels.copy(), golden.probabilities.copy()
    if field == "pixels":
        pixels[0, 0, 0, 0] ^= 1
    else:
        probabilities[0] = probabilities[0][::-1] + 0.01
    Golden(golden.encoded, pixels, golden.prepared, probabilities).save(tmp_path / GOLDEN)
    resealed = write_card(tmp_path, bundle.card)
    with pytest.raises(UntrustedModel, match="olden"):
        Network(resealed, threads=1).check_golden()


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


def reseal(folder: Path, name: str, data: bytes) -> Network:
    """A network from a bundle whose hashes agree, but whose `name` is `data`."""
    bundle = tiny_bundle(folder)
    (folder / name).write_bytes(data)
    return Network(write_card(folder, bundle.card), threads=1)


def test_a_file_that_is_no_network_is_not_trusted(tmp_path: Path) -> None:
    with pytest.raises(UntrustedModel, match=r"model\.onnx"):
        reseal(tmp_path, MODEL, b"no network")


def test_golden_inputs_that_cannot_be_read_or_check_nothing_are_not_trusted(tmp_path: Path) -> None:
    with pytest.raises(UntrustedModel, match=r"golden\.npz"):
        reseal(tmp_path / "a", GOLDEN, b"no archive").check_golden()
    bundle = tiny_bundle(tmp_path / "b")
    golden = bundle.golden
    Golden((), golden.pixels[:0], golden.prepared, golden.probabilities).save(tmp_path / "b" / GOLDEN)
    with pytest.raises(UntrustedModel, match="too little"):
        Network(write_card(tmp_path / "b", bundle.card), threads=1).check_golden()
