import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from medloop.bundle import Bundle, Pixels, load_reference, read_bundle
from medloop.engines import open_network
from medloop.errors import TrainingFailed
from medloop.nets import Architecture, ServedNetwork
from medloop.nets.architectures import IDS
from medloop.nets.export import check_agreement
from medloop.outliers import OutlierModel

Pictures = Callable[[Architecture, int], Pixels]
Make = Callable[..., ServedNetwork]
Export = Callable[[ServedNetwork, Path], Bundle]

LOAD_WITH_PYFUNC = """
import json, sys
import mlflow.pyfunc, numpy as np
found = mlflow.pyfunc.load_model(sys.argv[1]).predict({"image": np.load(sys.argv[2])})
print(json.dumps(found["probabilities"].tolist()))
"""


@pytest.mark.parametrize("architecture_id", IDS)
def test_onnx_runtime_and_torch_agree_on_every_architecture(
    architecture_id: str, network: Make, exported: Export, pictures: Pictures, tmp_path: Path
) -> None:
    made = network(architecture_id, size=64)
    images = pictures(made.architecture, 5)  # neither the batch it was exported with nor the one it was checked on
    expected = made.run(images)
    outputs = open_network(exported(made, tmp_path)).run(images)
    assert expected[0].std(axis=0).max() > 1e-3, "the images must be told apart, or nothing is tested"
    np.testing.assert_allclose(outputs.probabilities, expected[0], atol=1e-4)
    np.testing.assert_allclose(outputs.embedding, expected[1], rtol=1e-3, atol=1e-4)
    assert (outputs.cam is not None) == made.classifier.pools_mean


def test_a_colour_network_at_28_px_exports_with_its_class_maps(
    network: Make, exported: Export, pictures: Pictures, tmp_path: Path
) -> None:
    made = network(size=28, channels=3)
    images = pictures(made.architecture, 1)
    outputs = open_network(exported(made, tmp_path)).run(images)
    with torch.inference_mode():
        cam = made(torch.from_numpy(images))[2].numpy()
    assert outputs.cam is not None
    np.testing.assert_allclose(outputs.cam, cam, atol=1e-4)


def test_a_bundle_verifies_and_its_network_knows_the_golden_inputs(bundle: Bundle) -> None:
    assert read_bundle(bundle.folder).digest == bundle.digest
    assert open_network(bundle).check_golden().max_difference <= 1e-5
    assert set(bundle.card.files) == {
        "MLmodel",
        "architecture.json",
        "golden.npz",
        "model.onnx",
        "reference.npz",
        "weights.safetensors",
    }


def test_the_reference_holds_embeddings_labels_and_hashes(bundle: Bundle, pictures: Pictures) -> None:
    reference = load_reference(bundle)
    images = pictures(Architecture(id="small-resnet", classes=3, channels=1, size=32), 12)
    expected = open_network(bundle).run(images).embedding
    assert reference["embeddings"].dtype == np.float16
    np.testing.assert_allclose(reference["embeddings"], expected, rtol=2e-3, atol=1e-3)
    np.testing.assert_array_equal(reference["labels"], np.arange(12) % 3)
    assert reference["hashes"].shape == (12, 32)


def test_the_reference_knows_how_far_is_far(bundle: Bundle, pictures: Pictures) -> None:
    outliers = OutlierModel.load(bundle)
    assert outliers is not None
    assert len(outliers.training) == 12
    calibration = pictures(Architecture(id="small-resnet", classes=3, channels=1, size=32), 111)[12:]
    scores = outliers.score(open_network(bundle).run(calibration).embedding)
    # Of 99 images the furthest sets the threshold.
    assert outliers.threshold == pytest.approx(float(scores.max()), rel=1e-4)


def test_mlflow_loads_it_with_unpickling_forbidden(bundle: Bundle, tmp_path: Path) -> None:
    images = bundle.golden.prepared
    np.save(tmp_path / "images.npy", images)
    done = subprocess.run(
        [sys.executable, "-c", LOAD_WITH_PYFUNC, str(bundle.folder), str(tmp_path / "images.npy")],
        env=os.environ | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout), bundle.golden.probabilities, atol=1e-5)


def test_disagreement_stops_the_export(bundle: Bundle) -> None:
    golden = bundle.golden
    with pytest.raises(TrainingFailed, match="answers otherwise"):
        check_agreement(open_network(bundle), golden.prepared, golden.probabilities + np.float32(2e-4))


def test_answers_that_are_no_numbers_stop_the_export(network: Make, exported: Export, tmp_path: Path) -> None:
    made = network()
    with torch.no_grad():
        made.classifier.head.bias[0] = float("nan")
    with pytest.raises(TrainingFailed, match="nan"):
        exported(made, tmp_path)


def test_a_card_that_speaks_of_another_network_is_refused(network: Make, exported: Export, tmp_path: Path) -> None:
    made = network()
    made.architecture = made.architecture.model_copy(update={"classes": 4})
    with pytest.raises(ValueError, match="the card says"):
        exported(made, tmp_path)
