"""Only a version with a valid approval in force ever answers, and whatever goes wrong, the one before stays."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from medloop.bundle import GOLDEN, Bundle, Golden, write_card
from medloop.errors import NoModel
from medloop.registry import CHAMPION, TAG_APPROVAL, Registry, State, Version
from medloop.settings import HomeSettings
from medloop.testing import free_port, tiny_bundle
from medloop_inference.champion import RECHECK_SECONDS, Watcher

Evaluator = Any  # the small one of conftest.py


def served_version(watcher: Watcher) -> str | None:
    return watcher.current.ref.version if watcher.current else None


def reasons(watcher: Watcher) -> dict[str, str]:
    return {refused.version: refused.reason for refused in watcher.describe().refused}


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """An MLflow that does not answer."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return Registry(f"http://127.0.0.1:{free_port()}")


class CountingRegistry(Registry):
    """Counts the downloads."""

    downloads = 0

    def download_bundle(self, version: Version, destination: Path) -> Path:
        self.downloads += 1
        return super().download_bundle(version, destination)


class UnsteadyRegistry(Registry):
    """Asks `nowhere` while it is `down`."""

    def __init__(self, tracking_uri: str, nowhere: Registry) -> None:
        super().__init__(tracking_uri)
        self.nowhere, self.down = nowhere, False

    def state(self, model: str) -> State | None:
        return self.nowhere.state(model) if self.down else super().state(model)


def artifact(tmp_path: Path, name: str) -> Path:
    """The one file called `name` in MLflow's artifact store."""
    (found,) = (path for path in (tmp_path / "mlruns").rglob(name))
    return found


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_nothing_is_served_before_an_approval(watcher: Watcher, evaluator: Evaluator, first: Bundle) -> None:
    watcher.poll_once()
    with pytest.raises(NoModel, match=r"no approved champion yet.*medloop approve"):
        watcher.served()
    evaluator.register(first)
    watcher.poll_once()
    assert watcher.current is None
    assert watcher.unready_reason == "no approved champion yet"


def test_an_approved_champion_is_served_and_named_exactly(
    watcher: Watcher, evaluator: Evaluator, first: Bundle
) -> None:
    version = evaluator.champion(first)
    watcher.poll_once()
    ref = watcher.served().ref
    assert (ref.name, ref.version, ref.bundle_digest) == ("tiny", version, first.digest)
    assert (ref.engine, ref.precision, ref.dataset_id) == ("onnxruntime", "float32", first.card.dataset_id)
    assert watcher.unready_reason is None


def test_a_new_approval_swaps_and_what_began_ends_on_the_old_one(
    watcher: Watcher, evaluator: Evaluator, first: Bundle, second: Bundle
) -> None:
    evaluator.champion(first)
    watcher.poll_once()
    begun = watcher.served()
    evaluator.champion(second)
    watcher.poll_once()
    image = np.full((1, 16, 16, 1), 200, np.uint8)
    assert (begun.ref.version, watcher.served().ref.version) == ("1", "2")
    assert begun.network.run(image).probabilities[0, 1] > 0.5 > watcher.served().network.run(image).probabilities[0, 1]


def test_a_rollback_is_an_approval_of_an_older_version(
    watcher: Watcher, evaluator: Evaluator, first: Bundle, second: Bundle
) -> None:
    evaluator.champion(first)
    watcher.poll_once()
    evaluator.champion(second)
    watcher.poll_once()
    evaluator.approve("1", first)
    watcher.poll_once()
    assert served_version(watcher) == "1"
    assert watcher.served().ref.bundle_digest == first.digest


def test_an_alias_moved_by_hand_changes_nothing_and_says_why(
    watcher: Watcher, evaluator: Evaluator, registry: Registry, first: Bundle, second: Bundle
) -> None:
    evaluator.champion(first)
    watcher.poll_once()
    moved = evaluator.register(second)
    registry.set_alias("tiny", CHAMPION, moved)
    watcher.poll_once()
    assert served_version(watcher) == "1"
    assert reasons(watcher)[moved] == (
        "The champion alias points at version 2, but the approval in force is for version 1; "
        "approve it with medloop approve."
    )
    evaluator.approve(moved, second)
    assert watcher.champion_refused
    watcher.poll_once()
    assert served_version(watcher) == "2"
    assert reasons(watcher) == {}
    assert not watcher.champion_refused


def test_an_alias_set_by_hand_without_any_approval_serves_nothing(
    watcher: Watcher, evaluator: Evaluator, registry: Registry, first: Bundle
) -> None:
    registry.set_alias("tiny", CHAMPION, evaluator.register(first))
    watcher.poll_once()
    assert watcher.current is None
    assert "which nobody approved" in reasons(watcher)["1"]


def test_an_alias_moved_back_to_a_once_approved_version_changes_nothing(
    watcher: Watcher, evaluator: Evaluator, registry: Registry, first: Bundle, second: Bundle
) -> None:
    evaluator.champion(first)
    evaluator.champion(second)
    watcher.poll_once()
    registry.set_alias("tiny", CHAMPION, "1")
    watcher.poll_once()
    assert served_version(watcher) == "2"
    assert "the approval in force is for version 2" in reasons(watcher)["1"]


def test_an_older_approval_played_back_is_refused_also_after_a_restart(
    watcher: Watcher, evaluator: Evaluator, registry: Registry, first: Bundle, second: Bundle
) -> None:
    old = evaluator.approve(evaluator.register(first), first)
    watcher.poll_once()
    evaluator.champion(second)
    watcher.poll_once()
    evaluator.put_in_force(old)
    for each in (watcher, Watcher("tiny", registry, HomeSettings())):
        each.poll_once()
        assert served_version(each) == "2"
        assert "older than one that was accepted here" in reasons(each)["1"]


@pytest.mark.parametrize("field", [{"approver": "Somebody Else"}, {"sequence": 99}, {"bundle_digest": "0" * 64}])
def test_an_approval_changed_after_signing_is_refused(
    watcher: Watcher, evaluator: Evaluator, first: Bundle, field: dict[str, Any]
) -> None:
    approval = evaluator.sign(evaluator.register(first), first)
    evaluator.put_in_force(approval.model_copy(update=field))
    watcher.poll_once()
    assert watcher.current is None
    assert "signature does not verify" in reasons(watcher)["1"]


def test_an_approval_of_another_bundle_is_refused(
    watcher: Watcher, evaluator: Evaluator, first: Bundle, second: Bundle
) -> None:
    evaluator.approve(evaluator.register(first), second)
    watcher.poll_once()
    assert watcher.current is None
    assert "is not the expected one" in reasons(watcher)["1"]


def test_an_unreadable_approval_is_refused(
    watcher: Watcher, evaluator: Evaluator, registry: Registry, first: Bundle
) -> None:
    registry.set_alias("tiny", CHAMPION, evaluator.register(first))
    registry.set_model_tag("tiny", TAG_APPROVAL, json.dumps({"approver": "me"}))
    watcher.poll_once()
    assert "cannot be read" in reasons(watcher)["1"]


def test_a_key_made_after_the_start_is_found(
    watcher: Watcher, evaluator: Evaluator, first: Bundle, tmp_path: Path
) -> None:
    evaluator.champion(first)
    hidden = shutil.move(evaluator.keys_dir, tmp_path / "hidden")
    watcher.poll_once()
    assert "is not trusted here" in reasons(watcher)["1"]
    shutil.move(hidden, evaluator.keys_dir)
    watcher.poll_once()
    assert served_version(watcher) == "1"


def test_where_trusted_keys_have_a_folder_one_among_what_inference_keeps_is_not_trusted(
    evaluator: Evaluator, registry: Registry, first: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator.champion(first)
    monkeypatch.setenv("MEDLOOP_TRUSTED_KEYS", "")
    assert HomeSettings().trusted_dir == HomeSettings().keys_dir == evaluator.keys_dir
    monkeypatch.setenv("MEDLOOP_TRUSTED_KEYS", str(tmp_path / "trusted"))
    watcher = Watcher("tiny", registry, HomeSettings())
    watcher.poll_once()
    assert "is not trusted here" in reasons(watcher)["1"]
    shutil.copytree(evaluator.keys_dir, tmp_path / "trusted")
    watcher.poll_once()
    assert served_version(watcher) == "1"


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz", "bundle.json"])
def test_one_changed_byte_in_the_artifact_store_is_refused(
    watcher: Watcher, evaluator: Evaluator, first: Bundle, tmp_path: Path, clock: Any, name: str
) -> None:
    version = evaluator.register(first)
    stored = artifact(tmp_path, name)
    intact = stored.read_bytes()
    flip_byte(stored)
    evaluator.approve(version, first)
    watcher.poll_once()
    assert watcher.current is None
    assert name in reasons(watcher)[version] or "not the expected one" in reasons(watcher)[version]
    stored.write_bytes(intact)
    clock.now += RECHECK_SECONDS
    watcher.poll_once()
    assert served_version(watcher) == version


def test_a_changed_bundle_leaves_the_one_before_in_place(
    watcher: Watcher, evaluator: Evaluator, first: Bundle, second: Bundle, tmp_path: Path
) -> None:
    evaluator.champion(first)
    watcher.poll_once()
    known = artifact(tmp_path, "model.onnx")
    version = evaluator.register(second)
    (changed,) = (path for path in (tmp_path / "mlruns").rglob("model.onnx") if path != known)
    flip_byte(changed)
    evaluator.approve(version, second)
    watcher.poll_once()
    assert served_version(watcher) == "1"
    assert "its SHA-256 differs" in reasons(watcher)[version]


def test_a_network_that_answers_otherwise_than_in_training_is_refused(
    watcher: Watcher, evaluator: Evaluator, tmp_path: Path
) -> None:
    bundle = tiny_bundle(tmp_path / "wrong", model="tiny")
    golden = bundle.golden
    Golden(golden.encoded, golden.pixels, golden.prepared, golden.probabilities[::-1]).save(bundle.folder / GOLDEN)
    evaluator.champion(write_card(bundle.folder, bundle.card))
    watcher.poll_once()
    assert watcher.current is None
    assert "golden inputs are off" in reasons(watcher)["1"]


def test_a_file_that_is_no_network_is_refused(watcher: Watcher, evaluator: Evaluator, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "broken", model="tiny")
    (bundle.folder / "model.onnx").write_bytes(b"no network")
    evaluator.champion(write_card(bundle.folder, bundle.card))
    watcher.poll_once()
    assert watcher.current is None
    assert "no network that ONNX Runtime can run" in reasons(watcher)["1"]


def test_a_refused_bundle_is_not_downloaded_at_every_poll(
    tracking_uri: str, evaluator: Evaluator, first: Bundle, tmp_path: Path, clock: Any
) -> None:
    registry = CountingRegistry(tracking_uri)
    watcher = Watcher("tiny", registry, HomeSettings(), clock=clock)
    version = evaluator.register(first)
    flip_byte(artifact(tmp_path, "model.onnx"))
    evaluator.approve(version, first)
    for _ in range(3):
        watcher.poll_once()
    assert registry.downloads == 1
    evaluator.approve(version, first)
    watcher.poll_once()
    assert registry.downloads == 2


def test_a_served_bundle_is_downloaded_once(tracking_uri: str, evaluator: Evaluator, first: Bundle) -> None:
    registry = CountingRegistry(tracking_uri)
    evaluator.champion(first)
    for _ in range(2):
        watcher = Watcher("tiny", registry, HomeSettings())
        watcher.poll_once()
        watcher.poll_once()
        assert served_version(watcher) == "1"
    assert registry.downloads == 1
    assert [path.name for path in HomeSettings().bundles_dir.iterdir()] == [first.digest]


def test_a_restart_while_mlflow_is_down_serves_from_this_disk(
    watcher: Watcher, evaluator: Evaluator, nowhere: Registry, first: Bundle
) -> None:
    evaluator.champion(first)
    watcher.poll_once()
    restarted = Watcher("tiny", nowhere, HomeSettings())
    restarted.poll_once()
    assert restarted.served().ref == watcher.served().ref
    assert "MLflow does not answer" in restarted.describe().degraded["tracking"]


def test_it_is_ready_before_a_slow_mlflow_has_answered(
    watcher: Watcher, evaluator: Evaluator, tracking_uri: str, first: Bundle
) -> None:
    evaluator.champion(first)
    watcher.poll_once()
    told: list[str | None] = []
    when_asked: list[str | None] = []

    class Slow(Registry):
        def state(self, model: str) -> State | None:
            when_asked.extend(told)
            return super().state(model)

    Watcher("tiny", Slow(tracking_uri), HomeSettings(), report=told.append).poll_once()
    assert (when_asked, told) == ([None], [None, None])


@pytest.mark.parametrize("damage", ["bundle", "approval", "key"])
def test_what_lies_on_this_disk_is_checked_again(
    watcher: Watcher, evaluator: Evaluator, registry: Registry, nowhere: Registry, first: Bundle, damage: str
) -> None:
    evaluator.champion(first)
    watcher.poll_once()
    home = HomeSettings()
    key = next(home.keys_dir.glob("*.pub"))
    last = home.home / "inference" / "tiny" / "last_served.json"
    if damage == "bundle":
        flip_byte(home.bundles_dir / first.digest / "model.onnx")
    elif damage == "approval":
        last.write_text(last.read_text().replace('"Dr. Test"', '"Dr. Evil"'))
    else:
        saved = key.read_bytes()
        key.unlink()
    offline = Watcher("tiny", nowhere, home)
    offline.poll_once()
    assert offline.current is None
    why = {
        "bundle": "bundle of version 1 is missing or damaged",
        "approval": "signature does not verify",
        "key": "is not trusted here",
    }
    assert "cannot be served from this disk: " in (offline.unready_reason or "")
    assert why[damage] in (offline.unready_reason or "")
    assert "MLflow does not answer" in (offline.unready_reason or "")
    if damage == "key":
        key.write_bytes(saved)
    online = Watcher("tiny", registry, home)
    online.poll_once()
    assert served_version(online) == "1"
    assert online.degraded == {}


def test_mlflow_going_away_leaves_the_champion_and_shows(
    tracking_uri: str, evaluator: Evaluator, nowhere: Registry, first: Bundle, clock: Any
) -> None:
    registry = UnsteadyRegistry(tracking_uri, nowhere)
    watcher = Watcher("tiny", registry, HomeSettings(), clock=clock)
    evaluator.champion(first)
    watcher.poll_once()
    clock.now, registry.down = 5.0, True
    watcher.poll_once()
    assert served_version(watcher) == "1"
    assert "MLflow does not answer" in watcher.degraded["tracking"]
    assert watcher.tracking_age == 5.0
    registry.down = False
    watcher.poll_once()
    assert watcher.degraded == {}
    assert watcher.tracking_age == 0.0


def test_a_champion_alias_that_is_gone_changes_nothing_and_shows(
    watcher: Watcher, evaluator: Evaluator, registry: Registry, first: Bundle
) -> None:
    evaluator.champion(first)
    watcher.poll_once()
    registry.delete_alias("tiny", CHAMPION)
    watcher.poll_once()
    assert served_version(watcher) == "1"
    assert "alias is gone" in watcher.degraded["champion"]
    registry.set_alias("tiny", CHAMPION, "1")
    watcher.poll_once()
    assert watcher.degraded == {}


def test_between_an_approval_and_its_alias_nothing_is_refused(
    watcher: Watcher, evaluator: Evaluator, registry: Registry, first: Bundle, second: Bundle
) -> None:
    evaluator.champion(first)
    watcher.poll_once()
    approval = evaluator.sign(evaluator.register(second), second)
    registry.set_model_tag("tiny", TAG_APPROVAL, approval.model_dump_json())
    watcher.poll_once()
    assert served_version(watcher) == "1"
    assert reasons(watcher) == {}
    assert "the approval in force is for version 2" in watcher.degraded["champion"]
    registry.set_alias("tiny", CHAMPION, "2")
    watcher.poll_once()
    assert served_version(watcher) == "2"
    assert watcher.degraded == {}


def test_the_bundles_folder_being_unusable_is_a_reason(watcher: Watcher, evaluator: Evaluator, first: Bundle) -> None:
    HomeSettings().bundles_dir.write_text("a file where a folder should be")
    evaluator.champion(first)
    watcher.poll_once()
    assert watcher.current is None
    assert "cannot be read or written" in reasons(watcher)["1"]
