"""The development stack as its file describes it; that it starts, and what it survives, is tried where there is an
engine: `make compose-test`."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml  # type: ignore[import-untyped]  # ships no types
from medloop.cli.setup import TRUSTED
from medloop.settings import DEFAULT_PORTS, PLACEHOLDER, HomeSettings
from medloop.testing import free_port

ROOT = Path(__file__).resolve().parents[2]
MAKE_ENV = ROOT / "infra" / "compose" / "env.sh"
PUBLISHED = {"dashboard", "inference", "mlflow"}
JOBS = {"setup", "trainer", "cli"}
"""They come to an end, and serve nothing."""
SECRETS = {"POSTGRES_PASSWORD", "MONGO_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY", "DASHBOARD_KEY"}

Service = dict[str, Any]


@pytest.fixture(scope="module")
def stack() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


@pytest.fixture(scope="module")
def services(stack: dict[str, Any]) -> dict[str, Service]:
    found: dict[str, Service] = stack["services"]
    return found


def faults(service: Service, *, job: bool) -> Iterator[str]:
    """What keeps a service from being safe by default."""
    limits = service.get("deploy", {}).get("resources", {}).get("limits", {})
    yield from (f"no limit of {what}" for what in ("cpus", "memory", "pids") if not limits.get(what))
    if not service.get("read_only"):
        yield "a root file system that can be written to"
    if service.get("cap_drop") != ["ALL"] or service.get("cap_add"):
        yield "capabilities"
    if service.get("security_opt") != ["no-new-privileges:true"]:
        yield "new privileges"
    if service.get("privileged") or service.get("network_mode") or service.get("pid"):
        yield "the host's namespaces"
    if service.get("restart") != ("no" if job else "unless-stopped"):
        yield "no restart policy"
    if not any(str(mount).startswith("/tmp:") for mount in service.get("tmpfs", [])):
        yield "no /tmp"
    for mount in service.get("volumes", []):
        if str(mount if isinstance(mount, str) else mount["source"]).startswith((".", "/", "~")):
            yield f"a folder of the host: {mount}"
    yield from (f"a port for everybody: {port}" for port in service.get("ports", []) if not _on_loopback(port))


def _on_loopback(port: object) -> bool:
    return isinstance(port, str) and port.startswith("127.0.0.1:")


def default(text: str) -> str:
    """The text with each variable at its default."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


@pytest.mark.parametrize("name", sorted([*DEFAULT_PORTS, *JOBS, "mongodb", "postgres", "s3"]))
def test_every_service_is_safe_by_default(services: dict[str, Service], name: str) -> None:
    assert list(faults(services[name], job=name in JOBS)) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"deploy": {}}, "no limit of memory"),
        ({"read_only": False}, "a root file system that can be written to"),
        ({"cap_add": ["NET_ADMIN"]}, "capabilities"),
        ({"restart": None}, "no restart policy"),
        ({"ports": ["8080:8080"]}, "a port for everybody: 8080:8080"),
        ({"volumes": ["./data:/data"]}, "a folder of the host: ./data:/data"),
    ],
)
def test_what_is_not_is_noticed(services: dict[str, Service], change: Service, said: str) -> None:
    assert said in list(faults({**services["inference"], **change}, job=False))


def test_these_services_and_no_others(services: dict[str, Service]) -> None:
    assert services.keys() == DEFAULT_PORTS.keys() | JOBS | {"mongodb", "postgres", "s3"}


def test_only_what_people_open_is_published_on_the_port_of_the_design(services: dict[str, Service]) -> None:
    ports = {name: [default(port) for port in service.get("ports", [])] for name, service in services.items()}
    assert {name: published for name, published in ports.items() if published} == {
        name: [f"127.0.0.1:{DEFAULT_PORTS[name]}:{DEFAULT_PORTS[name]}"] for name in PUBLISHED
    }


def test_nothing_reaches_out_but_what_is_published(stack: dict[str, Any], services: dict[str, Service]) -> None:
    assert stack["networks"]["inside"] == {"internal": True}
    for name, service in services.items():
        assert service["networks"] == (["inside", "published"] if name in PUBLISHED else ["inside"]), name


def test_every_server_says_whether_it_is_well(services: dict[str, Service]) -> None:
    for name, service in services.items():
        if name in JOBS:
            assert service["healthcheck"] == {"disable": True}
        elif "build" in service:
            dockerfile = (ROOT / service["build"]["dockerfile"]).read_text()
            assert re.search(r"^HEALTHCHECK (?!NONE)", dockerfile, re.MULTILINE), name
        else:
            assert service["healthcheck"]["test"][0] == "CMD", name


def test_whoever_is_waited_for_says_when(services: dict[str, Service]) -> None:
    for name, service in services.items():
        for other, wait in service.get("depends_on", {}).items():
            expected = "service_completed_successfully" if other in JOBS else "service_healthy"
            assert wait["condition"] == expected, (name, other)


def test_no_image_is_whatever_is_newest(services: dict[str, Service]) -> None:
    for name, service in services.items():
        image = default(service["image"])
        _, _, tag = image.rpartition("/")[2].partition(":")
        assert tag, name
        assert tag != "latest", name
        if "build" in service:
            assert image == f"medloop-{name}:dev"
            assert (ROOT / service["build"]["dockerfile"]).is_file()


def test_a_secret_has_no_default() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    used = re.findall(r"\$\{(\w+)(:?[-?])", text)
    required = {name for name, how in used if how == ":?"}
    assert required == SECRETS | {"MEDLOOP_PERSON"}
    assert {name for name, how in used if name in required and how != ":?"} == set()
    assert re.findall(r"(?im)^\s*\w*(?:password|secret|api_key)\w*: +(?!\$\{)\S.*", text) == []


def test_inference_is_given_the_public_half_of_the_signing_key_alone(services: dict[str, Service]) -> None:
    with_signing_key = {
        name for name, one in services.items() if "evaluator:/var/lib/medloop" in one.get("volumes", [])
    }
    assert with_signing_key == {"evaluator", "setup"}
    [shared] = [mount for mount in services["inference"]["volumes"] if isinstance(mount, dict)]
    assert (shared["source"], shared["volume"]["subpath"]) == ("evaluator", f"keys/{TRUSTED}")


def test_inference_can_add_no_key_to_those_that_it_trusts(
    services: dict[str, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = [mount for mount in services["inference"]["volumes"] if isinstance(mount, dict)]
    writable = [mount.partition(":")[2] for mount in services["inference"]["volumes"] if isinstance(mount, str)]
    monkeypatch.setenv("MEDLOOP_HOME", "/var/lib/medloop")
    monkeypatch.setenv("MEDLOOP_TRUSTED_KEYS", services["inference"]["environment"]["MEDLOOP_TRUSTED_KEYS"])
    home = HomeSettings()
    assert [(mount["target"], mount["read_only"]) for mount in mounts] == [(str(home.trusted_dir), True)]
    assert writable == [str(home.home)]  # where it keeps API keys for a restart, too
    assert not home.trusted_dir.is_relative_to(home.home)


def test_artifacts_pass_mlflow_by_and_only_known_hosts_reach_it(services: dict[str, Service]) -> None:
    command = [default(argument) for argument in services["mlflow"]["command"]]
    assert "--no-serve-artifacts" in command
    assert "--default-artifact-root=s3://medloop/mlflow" in command
    assert "--allowed-hosts=mlflow:5000,127.0.0.1:5000,localhost:5000,localhost:5000" in command
    for name in ("evaluator", "explainer", "inference", "dashboard", "trainer", "cli"):
        environment = services[name]["environment"]
        assert environment["AWS_ENDPOINT_URL"] == "http://s3:9000"
        assert environment["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"


def test_services_have_the_time_that_they_need_to_stop(services: dict[str, Service]) -> None:
    """docs/access.md, "Limits": 30 s, and the drain before it."""
    for name in ("evaluator", "explainer", "inference", "trainer"):
        assert int(services[name]["stop_grace_period"].removesuffix("s")) >= 35, name


def test_inference_starts_without_its_stores_and_says_what_is_away(
    services: dict[str, Service], home: Path, tmp_path: Path
) -> None:
    """As Compose starts it, with every store's address one where nothing listens."""
    port, away = free_port(), free_port()
    given = {key: value for key, value in services["inference"]["environment"].items() if value}
    environment = {key: re.sub(r"\$\{\w+:.[^}]*\}", "medloop", value) for key, value in given.items()} | {
        "MEDLOOP_HOME": str(tmp_path / "inference"),
        "MEDLOOP_HOST": "127.0.0.1",
        "MEDLOOP_PORT": str(port),
        "MEDLOOP_RECORDS_URL": f"mongodb://medloop:hunter2@127.0.0.1:{away}/medloop",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{away}",
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{away}",
    }
    command = [sys.executable, "-m", "medloop_inference"]
    process = subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while (answer := ask(port, "/readyz")) is None or "no approved champion yet" not in answer.text:
            assert process.poll() is None
            assert time.monotonic() < deadline, answer and answer.text
            time.sleep(0.1)
        assert answer.status_code == 503
        for path, status in (("/livez", 200), ("/metrics", 401)):
            told = ask(port, path)
            assert told is not None
            assert told.status_code == status, path
    finally:
        process.terminate()
        said = process.communicate(timeout=60)[1]
    assert process.returncode == -signal.SIGTERM, said
    assert b"records" in said
    assert b"hunter2" not in said


def ask(port: int, path: str) -> httpx.Response | None:
    try:
        return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=30)
    except httpx.TransportError:
        return None


def make_env(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", MAKE_ENV, folder / ".env"], capture_output=True, text=True, timeout=60)


def read(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def test_secrets_are_made_once_for_each_machine(tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        assert make_env(tmp_path / name).returncode == 0
        path = tmp_path / name / ".env"
        assert path.stat().st_mode & 0o777 == 0o600
        made.append(read(path))
        assert make_env(tmp_path / name).returncode == 0
        assert read(path) == made[-1]  # the stores know them by now
    for secret in SECRETS:
        assert made[0][secret] != made[1][secret]
        assert len(made[0][secret]) >= 20
    assert made[0].keys() == SECRETS | {"MEDLOOP_PERSON"}


def test_the_dashboard_s_key_is_one_that_setup_takes(tmp_path: Path, medloop: Any, monkeypatch: Any) -> None:
    make_env(tmp_path)
    monkeypatch.setenv("MEDLOOP_API_KEY", read(tmp_path / ".env")["DASHBOARD_KEY"])
    assert medloop("setup")[0] == 0


@pytest.mark.parametrize("secret", sorted(SECRETS))
def test_a_placeholder_is_refused_by_name(tmp_path: Path, secret: str) -> None:
    make_env(tmp_path)
    path = tmp_path / ".env"
    path.write_text(re.sub(rf"^{secret}=.*", f"{secret}={PLACEHOLDER}", path.read_text(), flags=re.MULTILINE))
    refused = make_env(tmp_path)
    assert refused.returncode == 3
    assert f".env: {secret}." in refused.stderr


def test_make_up_asks_before_anything_starts(tmp_path: Path) -> None:
    """An engine that would be asked leaves a mark; with a placeholder it is never asked."""
    engine, env = tmp_path / "docker", tmp_path / ".env"
    engine.write_text('#!/bin/sh\necho "$@" >>"$(dirname "$0")/asked"\n')
    engine.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for secret, status, asked in (("POSTGRES_PASSWORD=x", 0, True), (f"POSTGRES_PASSWORD={PLACEHOLDER}", 2, False)):
        env.write_text(secret + "\n")
        done = subprocess.run(
            ["make", "up", f"ENV={env}"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == status, done.stderr
        assert (tmp_path / "asked").exists() == asked
        (tmp_path / "asked").unlink(missing_ok=True)
    assert "POSTGRES_PASSWORD" in done.stderr


def test_the_example_names_every_secret_of_the_stack() -> None:
    example = (ROOT / ".env.example").read_text()
    assert re.findall(rf"^([A-Z0-9_]+)={PLACEHOLDER}", example, re.MULTILINE) == sorted(SECRETS)


def test_secrets_stay_out_of_the_repository() -> None:
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()
