"""Changing the model while people ask: a swap is never half done, a rollback is instant, a fault leaves what was."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from medloop.bundle import GOLDEN, MODEL, Bundle, Golden, write_card
from medloop.registry import CHAMPION, NEWEST_BUNDLES, TAG_APPROVAL, UNUSED_S, Registry
from medloop.schemas import Approval
from medloop.settings import HomeSettings
from medloop.testing import FolderRegistry, tiny_bundle, tiny_probabilities
from medloop_inference.champion import RECHECK_SECONDS, TOUCH_SECONDS, Served, Watcher
from medloop_inference.loading import Wanted
from mlflow.store.artifact.artifact_repository_registry import _artifact_repository_registry
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

Evaluator = Any  # the small one of conftest.py
FLIPS, ASKING = 10, 6


@pytest.fixture
def shelf() -> FolderRegistry:
    return FolderRegistry()


@pytest.fixture
def watcher(shelf: FolderRegistry, home: Path, clock: Any) -> Watcher:
    return Watcher("tiny", shelf, HomeSettings(), wanted=Wanted(largest_batch=4), clock=clock)


@pytest.fixture
def third(tmp_path: Path) -> Bundle:
    return tiny_bundle(tmp_path / "third", model="tiny", bias=-2.0)


def answered_by(watcher: Watcher) -> str | None:
    return watcher.current.ref.version if watcher.current else None


def previous(watcher: Watcher) -> str | None:
    found = watcher.describe().previous
    return found.version if found else None


def reason(watcher: Watcher, version: str) -> str:
    return next(refused.reason for refused in watcher.describe().refused if refused.version == version)


class Desk:
    """Puts approvals in force on the shelf, as the evaluator does in MLflow."""

    def __init__(self, evaluator: Evaluator, shelf: FolderRegistry) -> None:
        self.evaluator, self.shelf = evaluator, shelf

    def put_in_force(self, approval: Approval) -> None:
        self.shelf.tags[TAG_APPROVAL] = approval.model_dump_json()
        self.shelf.aliases[CHAMPION] = approval.version

    def approve(self, version: str) -> Approval:
        approval: Approval = self.evaluator.sign(version, self.shelf.bundles[version])
        self.put_in_force(approval)
        return approval


@pytest.fixture
def desk(shelf: FolderRegistry, home: Path, evaluator: Evaluator) -> Desk:
    return Desk(evaluator, shelf)


def serve(watcher: Watcher, desk: Desk, *bundles: Bundle) -> None:
    """Approve one after the other."""
    for bundle in bundles:
        desk.approve(desk.shelf.add(bundle))
        watcher.poll_once()


def test_a_rollback_needs_neither_mlflow_s_files_nor_this_disk_nor_a_load(
    watcher: Watcher, shelf: FolderRegistry, desk: Desk, first: Bundle, second: Bundle
) -> None:
    serve(watcher, desk, first)
    network = watcher.served().network
    serve(watcher, desk, second)
    assert (answered_by(watcher), previous(watcher)) == ("2", "1")
    shutil.rmtree(HomeSettings().bundles_dir)
    shelf.asked.clear()
    approval = desk.approve("1")
    watcher.poll_once()
    assert watcher.served().network is network
    assert watcher.served().approval == approval
    assert (answered_by(watcher), previous(watcher)) == ("1", "2")
    assert shelf.asked == ["state"]


def test_a_disk_that_takes_nothing_does_not_stop_a_rollback(
    watcher: Watcher, desk: Desk, first: Bundle, second: Bundle
) -> None:
    serve(watcher, desk, first, second)
    newest = watcher.served().approval
    kept = HomeSettings().home / "inference" / "tiny"
    shutil.rmtree(kept)
    kept.write_text("a file where a folder should be")
    desk.approve("1")
    watcher.poll_once()
    assert (answered_by(watcher), previous(watcher)) == ("1", "2")
    assert "A restart would not know the approval of version 1: " in watcher.degraded["disk"]
    desk.put_in_force(newest)
    watcher.poll_once()
    assert answered_by(watcher) == "1"
    assert "older than one that was accepted here" in reason(watcher, "2")
    kept.unlink()
    watcher.poll_once()
    assert "disk" not in watcher.degraded
    assert Approval.model_validate_json((kept / "last_served.json").read_bytes()) == watcher.served().approval


def test_a_newer_approval_of_what_answers_keeps_the_previous_one(
    watcher: Watcher, desk: Desk, first: Bundle, second: Bundle
) -> None:
    serve(watcher, desk, first, second)
    desk.approve("2")
    watcher.poll_once()
    assert (answered_by(watcher), previous(watcher)) == ("2", "1")


@pytest.mark.parametrize("fault", ["replayed", "key", "changed", "alias"])
def test_a_rollback_in_memory_is_verified_all_the_same(
    watcher: Watcher, shelf: FolderRegistry, desk: Desk, first: Bundle, second: Bundle, fault: str
) -> None:
    serve(watcher, desk, first)
    old = watcher.served().approval
    serve(watcher, desk, second)
    if fault == "replayed":
        desk.put_in_force(old)
    elif fault == "key":
        desk.approve("1")
        next(HomeSettings().keys_dir.glob("*.pub")).unlink()
    elif fault == "changed":
        desk.put_in_force(desk.approve("1").model_copy(update={"approver": "Dr. Evil"}))
    else:
        shelf.aliases[CHAMPION] = "1"
    watcher.poll_once()
    assert (answered_by(watcher), previous(watcher)) == ("2", "1")
    said = {
        "replayed": "older than one that was accepted here",
        "key": "is not trusted here",
        "changed": "signature does not verify",
        "alias": "the approval in force is for version 2",
    }
    assert said[fault] in reason(watcher, "1")


def test_at_most_two_networks_are_kept_and_a_third_makes_room_before_it_is_loaded(
    watcher: Watcher, shelf: FolderRegistry, desk: Desk, first: Bundle, second: Bundle, third: Bundle
) -> None:
    serve(watcher, desk, first)
    network = weakref.ref(watcher.served().network)
    serve(watcher, desk, second)
    assert network() is not None
    golden = third.golden
    Golden(golden.encoded, golden.pixels, golden.prepared, golden.probabilities[::-1]).save(third.folder / GOLDEN)
    serve(watcher, desk, write_card(third.folder, third.card))
    gc.collect()
    assert network() is None
    assert (answered_by(watcher), previous(watcher)) == ("2", None)
    assert "golden inputs are off" in reason(watcher, "3")
    shelf.asked.clear()
    desk.approve("1")  # from this machine's disk
    watcher.poll_once()
    assert (answered_by(watcher), previous(watcher)) == ("1", "2")
    assert shelf.asked == ["state"]


def test_bundles_in_memory_stay_on_this_disk_while_unused_ones_go(
    watcher: Watcher, desk: Desk, first: Bundle, second: Bundle, clock: Any
) -> None:
    serve(watcher, desk, first, second)
    folder, held = HomeSettings().bundles_dir, {first.digest, second.digest}
    others = [f"{number:064x}" for number in range(2 * NEWEST_BUNDLES)]
    for other in others:
        (folder / other).mkdir()
    for age, name in enumerate([*others, *held]):
        used = time.time() - UNUSED_S - 60 * (age + 1)
        os.utime(folder / name, (used, used))
    clock.now += TOUCH_SECONDS
    watcher.poll_once()
    assert {path.name for path in folder.iterdir()} == {*held, *others[: NEWEST_BUNDLES - 2]}


def test_whoever_asks_during_swaps_gets_the_answer_of_the_version_that_is_named(
    watcher: Watcher, desk: Desk, first: Bundle, second: Bundle
) -> None:
    image = np.full((1, 16, 16, 1), 150, np.uint8)
    expected = {"1": tiny_probabilities(image[0]), "2": tiny_probabilities(image[0], bias=3.0)}
    digests = {"1": first.digest, "2": second.digest}
    serve(watcher, desk, first, second)
    done, wrong, asked = threading.Event(), list[str](), [0] * ASKING

    def check(served: Served) -> str | None:
        version = served.ref.version
        if {served.bundle.digest, served.network.bundle.digest, served.ref.bundle_digest} != {digests[version]}:
            return f"{served.ref} is half swapped"
        if served.approval.version != version:
            return f"version {version} answers under the approval of {served.approval.version}"
        answer = served.network.run(image).probabilities[0]
        return None if np.abs(answer - expected[version]).max() < 1e-5 else f"version {version} says {answer}"

    def ask(number: int) -> None:
        while not done.is_set():
            problem = check(watcher.served())
            if problem is not None:
                wrong.append(problem)
            asked[number] += 1

    def wait_until_all_asked() -> None:
        before, deadline = list(asked), time.monotonic() + 60
        while any(now == then for now, then in zip(asked, before, strict=True)):
            assert time.monotonic() < deadline, asked
            time.sleep(0.001)

    threads = [threading.Thread(target=ask, args=[number]) for number in range(ASKING)]
    for thread in threads:
        thread.start()
    try:
        for flip in range(FLIPS):
            version = "12"[flip % 2]
            desk.approve(version)
            watcher.poll_once()
            assert answered_by(watcher) == version
            assert {watcher.served().ref.version, previous(watcher)} == {"1", "2"}
            wait_until_all_asked()
    finally:
        done.set()
        for thread in threads:
            thread.join(30)
    assert wrong == []


def test_an_alias_that_points_at_nothing_changes_nothing(
    watcher: Watcher, shelf: FolderRegistry, desk: Desk, first: Bundle, second: Bundle, clock: Any
) -> None:
    serve(watcher, desk, first)
    version = shelf.add(second)
    desk.approve(version)
    deleted = shelf.bundles.pop(version)
    watcher.poll_once()
    assert answered_by(watcher) == "1"
    assert "version 2 is not in" in reason(watcher, "2")
    shelf.bundles[version] = deleted
    clock.now += RECHECK_SECONDS
    watcher.poll_once()
    assert answered_by(watcher) == "2"


def test_a_version_deleted_in_mlflow_leaves_the_champion(
    registry: Registry, home: Path, evaluator: Evaluator, first: Bundle, second: Bundle
) -> None:
    watcher = Watcher("tiny", registry, HomeSettings())
    evaluator.champion(first)
    watcher.poll_once()
    registry.client.delete_model_version("tiny", evaluator.champion(second))
    watcher.poll_once()
    assert answered_by(watcher) == "1"
    assert "alias is gone" in watcher.degraded["champion"]
    registry.client.delete_registered_model("tiny")
    watcher.poll_once()
    assert answered_by(watcher) == "1"


class FullDisk(LocalArtifactRepository):
    """A folder of MLflow's, fetched onto a disk where the kernel refuses every byte. Addresses: `full:/…`."""

    def __init__(self, artifact_uri: str, *args: Any, **options: Any) -> None:
        super().__init__(artifact_uri.removeprefix("full:"), *args, **options)

    def _download_file(self, remote_file_path: str, local_path: str) -> None:
        Path("/dev/full").write_bytes(b"a byte")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full (Linux)")
def test_a_full_disk_refuses_the_new_version_and_says_so(
    registry: Registry, home: Path, evaluator: Evaluator, first: Bundle, second: Bundle
) -> None:
    watcher = Watcher("tiny", registry, HomeSettings())
    evaluator.champion(first)
    watcher.poll_once()
    _artifact_repository_registry.register("full", FullDisk)  # type: ignore[no-untyped-call]
    registry.client.create_model_version("tiny", f"full:{second.folder}")
    evaluator.approve("2", second)
    watcher.poll_once()
    assert answered_by(watcher) == "1"
    assert "is full; free some space" in reason(watcher, "2")
    assert watcher.degraded == {}
    assert [path.name for path in HomeSettings().bundles_dir.iterdir()] == [first.digest]


KILLED = """
import sys, time
from pathlib import Path
from medloop.bundle import read_bundle
from medloop.registry import CHAMPION, TAG_APPROVAL
from medloop.settings import HomeSettings
from medloop.testing import FolderRegistry
from medloop_inference.champion import Watcher

class Slow(FolderRegistry):
    def download_bundle(self, version, destination):
        folder = super().download_bundle(version, destination)
        model = folder / "model.onnx"
        model.write_bytes(model.read_bytes()[:-100])
        print("half", flush=True)
        time.sleep(60)

shelf = Slow()
shelf.aliases[CHAMPION] = shelf.add(read_bundle(Path(sys.argv[1])))
shelf.tags[TAG_APPROVAL] = sys.argv[2]
Watcher("tiny", shelf, HomeSettings()).poll_once()
"""


def test_what_a_killed_process_had_half_loaded_is_never_served(
    watcher: Watcher, shelf: FolderRegistry, desk: Desk, first: Bundle
) -> None:
    approval = desk.approve(shelf.add(first))
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(first.folder), approval.model_dump_json()],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    bundles = HomeSettings().bundles_dir
    assert len(list(bundles.rglob(MODEL))) == 1  # what is left is there, under a name that nobody looks for
    watcher.poll_once()
    assert watcher.served().bundle.digest == first.digest
    assert shelf.asked.count("download_bundle") == 1
    assert (bundles / first.digest / MODEL).read_bytes() == (first.folder / MODEL).read_bytes()
