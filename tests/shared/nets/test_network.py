import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from medloop.bundle import ARCHITECTURE, WEIGHTS, Bundle, Pixels, write_card
from medloop.errors import UntrustedModel
from medloop.nets import Architecture, ServedNetwork, build, rebuild
from safetensors.torch import load_file, save_file

Pictures = Callable[[Architecture, int], Pixels]
Make = Callable[..., ServedNetwork]


def test_a_batch_answers_as_its_images_alone(network: Make, pictures: Pictures) -> None:
    made = network()
    images = pictures(made.architecture, 7)
    together, embeddings = made.run(images)
    alone = [made.run(image[None]) for image in images]
    assert together.std(axis=0).max() > 0.01, "the images must be told apart, or nothing is tested"
    np.testing.assert_allclose(together, np.concatenate([p for p, _ in alone]), atol=1e-5)
    np.testing.assert_allclose(embeddings, np.concatenate([e for _, e in alone]), atol=1e-4)


def test_run_splits_into_batches_and_restores_the_mode(network: Make, pictures: Pictures) -> None:
    made = network().train()
    images = pictures(made.architecture, 7)
    np.testing.assert_allclose(made.run(images, batch_size=3)[0], made.run(images)[0], atol=1e-5)
    assert made.training


def test_temperature_softens_and_leaves_the_order(network: Make, pictures: Pictures) -> None:
    made = network()
    images = pictures(made.architecture, 9)
    made.temperature.fill_(0.5)
    sharp, _ = made.run(images)
    made.temperature.fill_(4.0)
    soft, _ = made.run(images)
    np.testing.assert_array_equal(sharp.argsort(axis=1), soft.argsort(axis=1))
    assert (sharp.max(axis=1) > soft.max(axis=1)).all()


def test_probabilities_of_float_pixels_are_those_of_the_image(network: Make, pictures: Pictures) -> None:
    made = network()
    images = pictures(made.architecture, 5)
    with torch.inference_mode():
        found = made.probabilities(torch.from_numpy(images).permute(0, 3, 1, 2).float()).numpy()
    np.testing.assert_allclose(found, made.run(images)[0], atol=1e-6)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)


def test_grey_images_answer_as_their_copy_in_three_channels(network: Make, pictures: Pictures) -> None:
    made = network("resnet18")
    images = pictures(made.architecture, 4)
    np.testing.assert_allclose(made.run(images)[0], made.run(images.repeat(3, axis=3))[0], atol=1e-5)


def test_normalisation_needs_a_value_or_one_a_channel() -> None:
    architecture = Architecture(id="small-resnet", classes=2, channels=3, size=32)
    with pytest.raises(ValueError, match="1 or 3 values"):
        ServedNetwork(architecture, build(architecture), [0.5, 0.5], [1.0, 1.0])


def copied(bundle: Bundle, folder: Path) -> Bundle:
    shutil.copytree(bundle.folder, folder, dirs_exist_ok=True)
    return Bundle(folder, bundle.card, bundle.digest)


def test_a_rebuilt_network_has_the_same_weights_and_answers(bundle: Bundle, network: Make, pictures: Pictures) -> None:
    made, again = network(), rebuild(bundle)
    images = pictures(made.architecture, 5)
    assert not again.training
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in made.state_dict().items())
    np.testing.assert_allclose(again.run(images)[0], made.run(images)[0], atol=1e-6)


def test_weights_of_another_network_are_not_trusted(bundle: Bundle, tmp_path: Path) -> None:
    other = copied(bundle, tmp_path)
    weights = load_file(other.folder / WEIGHTS)
    save_file(weights | {"classifier.head.bias": torch.tensor([3.0, 0.0, 0.0])}, other.folder / WEIGHTS)
    with pytest.raises(UntrustedModel, match="golden inputs are off"):
        rebuild(write_card(other.folder, other.card))  # hashes are right again, answers are not


@pytest.mark.parametrize("file", [WEIGHTS, ARCHITECTURE])
def test_files_that_make_no_network_are_not_trusted(bundle: Bundle, tmp_path: Path, file: str) -> None:
    other = copied(bundle, tmp_path)
    (other.folder / file).write_bytes(b"{}")
    with pytest.raises(UntrustedModel, match="do not make a network"):
        rebuild(other)
