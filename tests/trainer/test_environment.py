import hashlib
import subprocess
from pathlib import Path

from medloop_trainer.environment import (
    available_memory,
    checkout,
    environment_digest,
    environment_tags,
    package_versions,
)


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


def test_a_checkout_has_a_commit_and_may_be_dirty(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    code = package / "code.py"
    code.write_text("1")
    assert checkout(package) is None
    git(tmp_path, "init")
    assert checkout(package) is None, "a package installed below somebody's checkout is no part of it"
    git(tmp_path, "add", "package")
    git(tmp_path, "commit", "-m", "first")
    clean = checkout(package)
    assert clean is not None
    assert (len(clean.commit), clean.dirty) == (40, False)
    code.write_text("2")
    changed = checkout(package)
    assert changed is not None
    assert (changed.commit, changed.dirty) == (clean.commit, True)


def test_the_environment_is_known_by_its_lock_files_or_by_what_is_installed(tmp_path: Path) -> None:
    installed = environment_digest(tmp_path, ("a.txt", "b.txt"))
    (tmp_path / "a.txt").write_text("x==1")
    assert environment_digest(tmp_path, ("a.txt", "b.txt")) == installed, "half a lock says nothing"
    (tmp_path / "b.txt").write_text("y==1")
    locked = environment_digest(tmp_path, ("a.txt", "b.txt"))
    assert locked == "lock:" + hashlib.sha256(b"a.txt 4\nx==1b.txt 4\ny==1").hexdigest()
    (tmp_path / "b.txt").write_text("y==2")
    assert len({installed, locked, environment_digest(tmp_path, ("a.txt", "b.txt"))}) == 3
    assert installed.startswith("installed:")


def test_memory_is_what_the_container_may_use(tmp_path: Path) -> None:
    limit = tmp_path / "sys/fs/cgroup/memory.max"
    limit.parent.mkdir(parents=True)
    limit.write_text("max\n")
    assert available_memory(tmp_path) > 2**20
    limit.write_text("1048576\n")
    assert available_memory(tmp_path) == 2**20


def test_the_tags_name_code_packages_and_machine() -> None:
    tags = environment_tags()
    assert tags["medloop.environment"].partition(":")[0] in {"lock", "installed"}
    assert int(tags["medloop.cpus"]) >= 1
    assert tags["medloop.cpu"]
    assert tags["medloop.gpus"]


def test_the_versions_that_made_a_bundle_are_named() -> None:
    assert {"python", "medloop", "torch", "onnxruntime", "numpy"} <= package_versions().keys()
