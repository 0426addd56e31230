"""What the training benchmark does beside the trainer: finding cut-off runs, simulating images, the peer's loader."""

import time
from pathlib import Path

import numpy as np
import pytest
from medloop.data.cache import open_cache
from medloop.nets import Architecture
from medloop.storage.objects import ObjectStore, open_objects
from medloop.vision.decode import decode
from medloop.vision.prepare import PreparationSpec
from medloop_trainer.checkpoint import About, Checkpoints, Snapshot
from medloop_trainer.modality import Moves
from medloop_trainer.recipe import Options, Recipe
from medloop_trainer.state import State

from benchmarks.training import jpegs, million
from benchmarks.training.loader import Peer
from benchmarks.training.process import Peak, anonymous_bytes
from benchmarks.training.runs import Wanted
from benchmarks.training.trainer import unfinished

DATASET = "d" * 64


@pytest.fixture
def objects(tmp_path: Path) -> ObjectStore:
    return open_objects((tmp_path / "objects").as_uri())


def leave_checkpoint(objects: ObjectStore, run_id: str, wanted: Wanted, dataset_id: str = DATASET) -> None:
    chosen = Options.checked(**wanted.options)
    about = About(
        run_id=run_id,
        model=wanted.set,
        dataset_id=dataset_id,
        preparation=PreparationSpec(mode="L", size=28),
        architecture=Architecture(id="small-resnet", classes=2, channels=1, size=28),
        recipe=Recipe.settle(chosen, architecture="small-resnet", size=28, images=40, pretrained=None),
        checkpoint_steps=3,
        compiled=False,
        device="cpu",
        threads=1,
        packages={},
    )
    Checkpoints(objects, about).save(Snapshot(State(), {}))


def test_the_run_that_was_cut_off_is_found_among_others(objects: ObjectStore) -> None:
    wanted = Wanted("breastmnist", 1)
    assert unfinished(objects, wanted, DATASET) is None
    leave_checkpoint(objects, "a" * 32, Wanted("breastmnist", 0))
    leave_checkpoint(objects, "b" * 32, Wanted("breastmnist", 1, cutmix=False))
    leave_checkpoint(objects, "c" * 32, Wanted("pneumoniamnist", 1))
    leave_checkpoint(objects, "e" * 32, wanted, "e" * 64)
    assert unfinished(objects, wanted, DATASET) is None
    leave_checkpoint(objects, "f" * 32, wanted)
    assert unfinished(objects, wanted, DATASET) == "f" * 32


def test_a_checkpoint_that_cannot_be_read_is_told_and_passed_over(
    objects: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_checkpoint(objects, "b" * 32, Wanted("breastmnist", 0))
    objects.put(f"training/{'a' * 32}/checkpoint-00000001-{'0' * 64}.safetensors", b"nothing")
    assert unfinished(objects, Wanted("breastmnist", 0), DATASET) == "b" * 32
    assert "a" * 32 in capsys.readouterr().err


def test_simulated_images_are_taken_for_a_whole_cache(
    tmp_path: Path, objects: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    images = 3000  # more than one block of checksums
    manifest = million.build(objects, tmp_path / "cache", images)
    objects.delete("images/million.png")  # so that decoding them would fail
    cache = open_cache(manifest, PreparationSpec(mode="L", size=million.SIZE), objects, tmp_path / "cache")
    assert cache.images.shape == (images, million.SIZE, million.SIZE, 1)
    assert not cache.images.any()
    assert not caplog.records
    assert (tmp_path / "cache").stat().st_blocks * 512 < 2**16
    assert {split: sum(counts.values()) for split, counts in manifest.counts().items()} == {
        "train": images - 900,
        "val": 300,
        "calibration": 300,
        "test": 300,
    }


def test_the_peer_reads_the_same_pixels_as_we_do(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 1), np.uint8)
    decoded = []
    for index, image in enumerate(images):
        file = tmp_path / f"class{index % 2}" / f"{index}.jpg"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(jpegs.jpeg(image))
        decoded.append(decode(file.read_bytes()).pixels.squeeze())
    peer = Peer(tmp_path, Moves(), workers=0, size=4)
    assert peer.epoch() == 6
    found = np.concatenate([pixels.numpy() for pixels, _ in peer.loader])
    assert found.shape == (6, 1, 16, 16)
    assert found.dtype == np.float32
    key = {image.tobytes() for image in np.stack(decoded).astype(np.float32)}
    assert {image.squeeze(0).tobytes() for image in found} == key


def test_the_peak_of_anonymous_memory_is_seen_and_files_are_not(tmp_path: Path) -> None:
    size = 64 << 20
    (tmp_path / "file").write_bytes(bytes(size))
    with Peak() as peak:
        before = anonymous_bytes()
        mapped = np.memmap(tmp_path / "file", np.uint8, "r")
        assert mapped.sum() == 0  # every page was read
        assert anonymous_bytes() < before + size / 2
        held = np.ones(size, np.uint8)
        until = time.monotonic() + 30
        while peak.bytes < before + size * 0.9 and time.monotonic() < until:
            time.sleep(0.01)
        del held
    assert peak.bytes >= before + size * 0.9
