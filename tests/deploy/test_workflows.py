"""GitHub's workflows as files, the linters that look over them, and their scripts with stand-ins for what they call."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # ships no types

from k8s.check.render import CannotCheck, copied, find_kubectl, kustomize

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SCRIPTS = ROOT / ".github" / "scripts"
EKS = ROOT / "k8s" / "overlays" / "eks"
ACTIONLINT = ROOT / ".venv-actionlint"
IMAGES = {"mlflow", *(path.parent.name for path in (ROOT / "services").glob("*/pyproject.toml"))}
COMMIT = "c0ffee" * 6 + "c0ff"
DIGEST = "sha256:" + "d1" * 32


def read(path: Path) -> dict[Any, Any]:
    found: dict[Any, Any] = yaml.safe_load(path.read_text())
    return found


def jobs(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, job in read(path)["jobs"].items():
        yield f"{path.name}: {name}", job


ALL_JOBS = [pytest.param(job, id=name) for path in WORKFLOWS for name, job in jobs(path)]


def steps(job: dict[str, Any], action: str) -> list[dict[str, Any]]:
    return [step for step in job.get("steps", []) if step.get("uses", "").startswith(f"{action}@")]


def runs(job: dict[str, Any]) -> str:
    return "\n".join(step.get("run", "") for step in job.get("steps", []))


# -- what they say


def test_every_action_is_pinned_to_a_commit_whose_version_is_named() -> None:
    """The same action is the same commit everywhere, so that an update is one line's change repeated."""
    used: dict[str, set[tuple[str, str]]] = {}
    for path in WORKFLOWS:
        for line in re.findall(r"^\s*(?:- )?uses: (?!\./)(.+)$", path.read_text(), re.MULTILINE):
            pin = re.fullmatch(r"([\w./-]+)@([0-9a-f]{40}) # (v\d+\.\d+\.\d+)", line)
            assert pin, f"{path.name}: {line}"
            used.setdefault(pin[1], set()).add((pin[2], pin[3]))
    assert used
    assert {action: pins for action, pins in used.items() if len(pins) > 1} == {}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_do_nothing_by_itself_and_does_not_run_twice_at_once(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {}
    assert workflow["concurrency"]["group"]
    assert "pull_request_target" not in workflow[True]  # YAML 1.1 takes `on` for a truth value
    assert "workflow_run" not in workflow[True]


@pytest.mark.parametrize("job", ALL_JOBS)
def test_a_job_ends_and_keeps_no_more_than_it_needs(job: dict[str, Any]) -> None:
    calls = "uses" in job  # another workflow, whose jobs say these themselves
    assert calls or 0 < job["timeout-minutes"] <= 60
    assert "${{" not in runs(job), "what comes from outside goes through env, where it is no code"
    assert all(step["with"]["persist-credentials"] is False for step in steps(job, "actions/checkout"))
    assert "cache" not in str(job)
    if "secrets." in str(job):
        assert job.get("environment"), "only an environment's rules guard a secret"
        assert job["permissions"] == {"contents": "read"}


def test_who_scans_an_image_could_steal_nothing_and_who_publishes_it_needs_the_scan() -> None:
    images = read(ROOT / ".github" / "workflows" / "images.yml")["jobs"]
    for name in ("build", "scan"):
        assert images[name].get("permissions", {}) in ({}, {"contents": "read"})
        assert "environment" not in images[name]
        assert "secrets" not in str(images[name])
    assert images["scan"]["needs"] == "build"
    assert images["publish"]["needs"] == "scan"
    assert "refs/heads/main" in images["publish"]["if"]


def test_nothing_says_yes_to_a_host_that_nobody_knows() -> None:
    text = "".join(path.read_text() for path in [*WORKFLOWS, *SCRIPTS.iterdir()])
    assert "StrictHostKeyChecking yes" in text
    for loophole in ("StrictHostKeyChecking=no", "StrictHostKeyChecking no", "accept-new", "ssh-keyscan"):
        assert loophole not in text


def test_reviewers_are_told_where_the_diff_is_before_they_are_asked() -> None:
    """The job that shows it waits for them; a run that only shows it does not wait for the one they are to judge."""
    workflow = read(ROOT / ".github" / "workflows" / "deploy-prod.yml")
    ask, deploy = workflow["jobs"]["ask"], workflow["jobs"]["deploy"]
    assert "environment" in deploy
    assert "environment" not in ask
    assert ask["needs"] == deploy["needs"] == "images"
    assert "only-diff" in runs(ask)
    assert "inputs.only-diff" in workflow["concurrency"]["group"]


# -- that they agree with the rest of the tree


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_what_they_run_exists(path: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for _, job in jobs(path):
        assert set(re.findall(r"\bmake ([a-z-]+)", runs(job))) <= targets
        for script in re.findall(r"\.github/scripts/([\w-]+)", runs(job)):
            assert os.access(SCRIPTS / script, os.X_OK), script


def test_the_tests_run_on_every_python_that_is_supported() -> None:
    project = tomllib.loads((ROOT / "shared" / "pyproject.toml").read_text())["project"]
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    matrix = read(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert matrix == ["3.11", "3.12", "3.13"]
    assert f">={matrix[0]}" == project["requires-python"]
    assert matrix[0] == tools["mypy"]["python_version"]


def test_every_image_is_built_scanned_and_published_and_every_service_installed_alone() -> None:
    images = read(ROOT / ".github" / "workflows" / "images.yml")["jobs"]
    for job in images.values():
        assert set(job["strategy"]["matrix"]["image"]) == IMAGES
    alone = read(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["alone"]
    assert set(alone["strategy"]["matrix"]["service"]) == IMAGES - {"mlflow"}


def test_contracts_are_tried_on_the_servers_that_compose_has() -> None:
    contract = read(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["contract"]
    compose = (ROOT / "docker-compose.yml").read_text()
    for server in contract["services"].values():
        assert f":-{server['image']}}}" in compose


def test_dependencies_wait_before_they_are_taken_in() -> None:
    updates = read(ROOT / ".github" / "dependabot.yml")["updates"]
    assert {update["package-ecosystem"] for update in updates} == {"github-actions", "npm"}
    for update in updates:
        assert update["cooldown"]["default-days"] >= 7
        assert update["groups"]
    resolve = read(ROOT / ".github" / "workflows" / "locks.yml")["jobs"]["resolve"]
    assert "7 days" in [step.get("env", {}).get("UV_EXCLUDE_NEWER") for step in resolve["steps"]]


# -- the linters


def lint(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def test_zizmor_finds_an_action_that_is_not_pinned(tmp_path: Path) -> None:
    zizmor = [str(Path(sys.executable).with_name("zizmor")), "--offline", "--no-progress", "--quiet"]
    workflow = tmp_path / ".github" / "workflows" / "ci.yml"
    workflow.parent.mkdir(parents=True)
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    workflow.write_text(text)
    assert lint([*zizmor, str(tmp_path)]).returncode == 0
    workflow.write_text(re.sub(r"actions/checkout@[0-9a-f]{40} # v\d+\.\d+\.\d+", "actions/checkout@v6", text))
    found = lint([*zizmor, str(tmp_path)])
    assert found.returncode != 0
    assert "unpinned-uses" in found.stdout


def test_actionlint_finds_a_fault_and_says_where(tmp_path: Path) -> None:
    if shutil.which("node") is None or not (ACTIONLINT / "installed").exists():
        pytest.skip("needs node, and make lint-workflows once")
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    workflow = tmp_path / "ci.yml"
    workflow.write_text(text.replace("runs-on:", "run-on:", 1))
    line = next(number for number, each in enumerate(workflow.read_text().splitlines(), 1) if "run-on:" in each)
    found = lint(["node", str(ROOT / ".github" / "actionlint" / "lint.mjs"), str(ACTIONLINT), str(workflow)])
    assert found.returncode == 1
    assert f'{workflow}:{line}:5: unexpected key "run-on"' in found.stdout


def test_the_lock_of_actionlint_holds_hashes_and_no_address() -> None:
    lock = (ROOT / ".github" / "actionlint" / "package-lock.json").read_text()
    assert lock.count('"version"') == lock.count('"integrity": "sha512-')
    assert "resolved" not in lock
    assert "registry" not in lock
    assert "://" not in lock  # npm writes whom to fund beside a package: take that out


# -- the scripts


class Host:
    """A home with a PATH of stand-ins, each of which writes down how it was called and then does as it was told."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.bin = folder / "bin"
        self.home.mkdir()
        self.bin.mkdir()
        self.log = folder / "calls.txt"
        self.log.touch()

    def stands_in(self, name: str, does: str = ":") -> None:
        script = self.bin / name
        script.write_text(f'#!/bin/bash\necho "{name} $*" >> "{self.log}"\n{does}\n')
        script.chmod(0o755)

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.bin}:{os.environ['PATH']}"
        return subprocess.run(
            [str(SCRIPTS / script), *arguments],
            env={"PATH": path, "HOME": str(self.home), "GITHUB_SHA": COMMIT, **environment},
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def registry(host: Host) -> Host:
    """Where images go: the commit's tag is not there, drafts are."""
    for name in ("docker", "zstd", "cosign"):
        host.stands_in(name)
    host.stands_in("aws", f'[[ "$*" == *imageTag={COMMIT}* ]] && exit 254; echo {DIGEST}')
    return host


PUBLISHING = {"REGISTRY": "registry", "SIGNER": "me", "GITHUB_RUN_ID": "7", "GITHUB_RUN_ATTEMPT": "1"}


def publish(host: Host) -> subprocess.CompletedProcess[str]:
    return host.run("publish", "inference", "image.tar.zst", "sbom.json", **PUBLISHING)


def test_an_image_is_signed_before_the_commits_tag_names_it(registry: Host) -> None:
    done = publish(registry)
    assert (done.returncode, done.stdout) == (0, f"{DIGEST}\n")
    order = ["docker push registry/medloop-inference:run-7-1", "cosign sign", "cosign attest", "cosign verify"]
    order.append(f"docker push registry/medloop-inference:{COMMIT}")
    positions = [next(at for at, call in enumerate(registry.calls) if call.startswith(each)) for each in order]
    assert positions == sorted(positions)
    assert f"cosign sign --yes registry/medloop-inference@{DIGEST}" in registry.calls


@pytest.mark.parametrize("fails", ["sign", "attest", "verify"])
def test_what_could_not_be_signed_gets_no_tag(registry: Host, fails: str) -> None:
    registry.stands_in("cosign", f'[ "$1" != {fails} ]')
    done = publish(registry)
    assert done.returncode != 0
    assert done.stdout == ""
    assert not [call for call in registry.calls if call.startswith("docker push") and COMMIT in call]


def test_a_second_run_takes_the_first_ones_image_and_checks_its_signature(registry: Host) -> None:
    registry.stands_in("aws", f"echo {DIGEST}")
    assert publish(registry).stdout == f"{DIGEST}\n"
    assert not [call for call in registry.calls if call.startswith("docker")]
    registry.stands_in("cosign", "exit 1")
    assert publish(registry).returncode != 0


@pytest.fixture
def cluster(host: Host) -> Host:
    host.stands_in("kustomize", "pwd >> kustomized")
    (host.home / "digests").mkdir()
    for image in IMAGES:
        (host.home / "digests" / image).write_text(f"{DIGEST}\n")
    overlay = host.home / "k8s" / "overlays" / "eks"
    overlay.mkdir(parents=True)
    (overlay / "kustomization.yaml").touch()
    return host


def render(host: Host, image: str, overlay: str = "k8s/overlays/eks") -> subprocess.CompletedProcess[str]:
    host.stands_in("kubectl", f"echo '        - image: {image}'")
    return host.run("render", overlay, "digests", REGISTRY="registry")


def test_manifests_name_what_was_published_by_its_digest(cluster: Host) -> None:
    done = render(cluster, f"registry/medloop-inference@{DIGEST}")
    assert (done.returncode, done.stdout.strip()) == (0, f"- image: registry/medloop-inference@{DIGEST}")
    named = {call for call in cluster.calls if call.startswith("kustomize edit set image")}
    assert named == {
        f"kustomize edit set image medloop-{image}={pinned} registry/medloop-{image}={pinned}"
        for image in IMAGES
        for pinned in [f"registry/medloop-{image}@{DIGEST}"]
    }


@pytest.mark.parametrize(
    "overlay", ["", "k8s/overlays/staging", "k8s/overlays/../../elsewhere", "/etc", "k8s/overlays/eks;id"]
)
def test_only_an_overlay_of_the_commit_is_deployed(cluster: Host, overlay: str) -> None:
    refused = render(cluster, f"registry/medloop-inference@{DIGEST}", overlay)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert f"'{overlay}' is no overlay of this commit" in refused.stderr
    assert not cluster.calls


def test_an_overlay_on_top_of_another_gets_the_digests_too() -> None:
    """What `render` has kustomize write into such an overlay, rendered: a component's own Job is among the images."""
    try:
        kubectl = find_kubectl()
    except CannotCheck as exc:
        pytest.skip(str(exc))
    registry = "111122223333.dkr.ecr.eu-central-1.amazonaws.com"
    with copied() as k8s:
        mine = k8s / "overlays" / "mine"
        mine.mkdir()
        images = [
            {"name": name, "newName": f"{registry}/medloop-{image}", "digest": DIGEST}
            for image in sorted(IMAGES)
            for name in (f"medloop-{image}", f"{registry}/medloop-{image}")
        ]
        components = ["../../components/monitoring", "../../components/training", "../../components/gpu"]
        (mine / "kustomization.yaml").write_text(
            yaml.safe_dump({"resources": ["../eks"], "components": components, "images": images})
        )
        found = re.findall(r"image: (.+)", kustomize(kubectl, mine))
    assert {re.sub(r".*medloop-|@.*", "", image) for image in found} == IMAGES
    assert [image for image in found if not image.endswith(f"@{DIGEST}")] == []


def test_what_was_not_published_is_not_deployed(cluster: Host) -> None:
    unpinned = render(cluster, "registry/medloop-inference:latest")
    assert unpinned.returncode == 1
    assert "medloop-inference:latest" in unpinned.stderr
    (cluster.home / "digests" / "explainer").write_text("None\n")
    missing = render(cluster, f"registry/medloop-inference@{DIGEST}")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "explainer was not published" in missing.stderr


def test_a_load_balancer_that_nobody_named_is_not_deployed(cluster: Host) -> None:
    placeholder = re.search(r"value: (arn:aws:elasticloadbalancing:\S+)", (EKS / "kustomization.yaml").read_text())
    assert placeholder
    refused = render(cluster, f"registry/medloop-inference@{DIGEST}\n value: {placeholder[1]}")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "does not name the load balancer" in refused.stderr


needs_jq = pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq, which GitHub's machines have")


@needs_jq
def test_what_was_applied_before_is_applied_again(cluster: Host) -> None:
    live = """{"items": [
        {"metadata": {"annotations": {"kubectl.kubernetes.io/last-applied-configuration":
            "{\\"kind\\":\\"Deployment\\",\\"spec\\":{\\"image\\":\\"old\\"}}\\n"}}},
        {"metadata": {"name": "made by hand"}}]}"""
    script = "case \"$*\" in *'--output name') echo deployment.apps/inference ;; *) echo '" + live + "' ;; esac"
    cluster.stands_in("kubectl", script)
    kept = cluster.run("applied", "rendered.yaml").stdout
    assert yaml.safe_load(kept)["items"] == [{"kind": "Deployment", "spec": {"image": "old"}}]
    (cluster.home / "before.json").write_text(kept)
    undone = cluster.run("undo", "before.json")
    assert undone.returncode == 0
    assert "was undone" in undone.stdout
    assert cluster.calls[-3:] == [
        "kubectl apply -f before.json",
        "kubectl get -f before.json --output name",
        "kubectl rollout status deployment.apps/inference --timeout 10m",
    ]


@needs_jq
@pytest.mark.parametrize("live", ["", '{"items": []}'])
def test_a_first_deployment_has_nothing_to_go_back_to(cluster: Host, live: str) -> None:
    cluster.stands_in("kubectl", f"echo '{live}'")
    (cluster.home / "before.json").write_text(cluster.run("applied", "rendered.yaml").stdout)
    undone = cluster.run("undo", "before.json")
    assert undone.returncode == 1
    assert "nothing was deployed before" in undone.stdout
    assert not [call for call in cluster.calls if "apply -f" in call]


def test_a_service_that_is_not_whole_fails_the_smoke_test(cluster: Host) -> None:
    cluster.stands_in("kubectl", "[ $1 != get ] || echo 'NAME READY RESTARTS'")
    passed = cluster.run("smoke-cluster", SETTLE_SECONDS="0")
    assert passed.returncode == 0
    assert passed.stdout.count(": ready") == len(IMAGES - {"trainer"})
    assert "NAME READY RESTARTS" in passed.stdout
    cluster.stands_in("kubectl", "[[ $* != *deployment/inference* ]]")
    failed = cluster.run("smoke-cluster", SETTLE_SECONDS="0")
    assert failed.returncode == 1
    assert "- inference: not ready\n- dashboard: ready\n" in failed.stdout


def test_the_build_of_torch_is_the_repositorys_and_no_code(host: Host) -> None:
    """The step as it stands, as GitHub's bash runs it: for the two images with torch, and for a plain name only."""
    steps = read(ROOT / ".github" / "workflows" / "images.yml")["jobs"]["build"]["steps"]
    build = host.home / "build"
    build.write_text(
        "#!/bin/bash\nset -eo pipefail\n" + next(step["run"] for step in steps if step.get("name") == "Build")
    )
    build.chmod(0o755)
    host.stands_in("docker")
    there = {"GITHUB_SERVER_URL": "https://example.com", "GITHUB_REPOSITORY": "o/r"}
    for image in sorted(IMAGES):
        assert host.run(str(build), IMAGE=image, TORCH="cu130", **there).returncode == 0
        assert ("--build-arg TORCH=cu130 " in host.calls[-1]) is (image in {"trainer", "explainer"})
    refused = host.run(str(build), IMAGE="trainer", TORCH="cpu $(id)", **there)
    assert (refused.returncode, len(host.calls)) == (1, len(IMAGES))
    assert "'cpu $(id)', and no name of a build" in refused.stdout


@pytest.mark.parametrize(
    ("state", "status"), [("running healthy", 0), ("running unhealthy", 1), ("exited starting", 1)]
)
def test_an_image_is_tried_locked_up_and_taken_away(host: Host, state: str, status: int) -> None:
    host.stands_in("docker", f"[ $1 != inspect ] || echo '{state}'")
    assert host.run("smoke", "inference", "medloop-inference:test").returncode == status
    started = next(call for call in host.calls if call.startswith("docker run"))
    for lock in ("--read-only", "--cap-drop ALL", "no-new-privileges"):
        assert lock in started
    assert host.calls[-1].startswith("docker rm --force --volumes smoke-inference")


def test_the_server_is_known_before_it_is_spoken_to(host: Host) -> None:
    known = {"KEY": "key", "KNOWN_HOSTS": "dev.test ssh-ed25519 AAAA", "HOST": "dev.test", "USER_NAME": "deploy"}
    for name in known:
        refused = host.run("trust-host", **(known | {name: ""}))
        assert refused.returncode == 1
        assert f"{name} is empty" in refused.stderr
    assert host.run("trust-host", **known).returncode == 0
    assert (host.home / ".ssh" / "known_hosts").read_text() == "dev.test ssh-ed25519 AAAA\n"
    assert (host.home / ".ssh" / "dev_key").stat().st_mode & 0o077 == 0


@pytest.fixture
def server(host: Host) -> Host:
    """A server on which five releases were started one after the other, and `bad` never will be."""
    host.stands_in("docker", 'case "$*" in *:two" "*) echo medloop-inference:two; echo medloop-mlflow:two ;; esac')
    host.stands_in("make", '[[ "$*" != *releases/bad* ]]')
    for age, release in enumerate(("one", "two", "three", "four", "five", "bad")):
        (host.home / "medloop" / "releases" / release).mkdir(parents=True)
        os.utime(host.home / "medloop" / "releases" / release, (1000 + age, 1000 + age))
    return host


def test_a_release_that_is_healthy_becomes_the_current_one_and_few_are_kept(server: Host) -> None:
    assert server.run("release-on-host", "one").returncode == 0
    medloop = server.home / "medloop"
    assert (medloop / "current").readlink() == Path("releases/one")
    assert {path.name for path in (medloop / "releases").iterdir()} == {"one", "bad", "five"}
    assert server.calls[0] == f"make --directory {medloop}/releases/one up ENV={medloop}/.env"
    listed = [re.search(r"reference=medloop-\*:(\w+)", call) for call in server.calls]
    assert [each[1] for each in listed if each] == ["four", "three", "two"]
    assert [call for call in server.calls if "image rm" in call] == [
        "docker image rm medloop-inference:two medloop-mlflow:two"
    ]


def test_a_release_that_is_not_healthy_gives_way_to_what_ran_before(server: Host) -> None:
    alone = server.run("release-on-host", "bad")
    assert alone.returncode == 1
    assert "nothing before it" in alone.stderr
    server.run("release-on-host", "one")
    refused = server.run("release-on-host", "bad")
    assert refused.returncode == 1
    assert "bad did not get healthy; one runs again." in refused.stderr
    assert (server.home / "medloop" / "current").readlink() == Path("releases/one")
    assert server.calls[-1].startswith(f"make --directory {server.home}/medloop/releases/one up")
