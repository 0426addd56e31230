"""The process: how it is configured, and that it comes and goes cleanly."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from medloop.auth import AuthSettings
from medloop.errors import Forbidden
from medloop.settings import ServerSettings
from medloop.testing import free_port
from medloop_dashboard.__main__ import command
from medloop_dashboard.settings import DashboardSettings

HEAVY = ("torch", "torchvision", "mlflow.pyfunc", "sklearn", "matplotlib", "onnxruntime")
"""What no page may need."""


def test_loopback_only_unless_a_proxy_stands_in_front() -> None:
    flags = command(ServerSettings(), AuthSettings(), DashboardSettings())
    assert "--server.address=127.0.0.1" in flags
    assert "--server.port=8501" in flags
    assert "--server.allowedHosts=localhost" in flags
    with pytest.raises(Forbidden, match="MEDLOOP_AUTH=proxy"):
        command(ServerSettings(host="0.0.0.0"), AuthSettings(), DashboardSettings())
    with pytest.raises(Forbidden, match="MEDLOOP_AUTH=proxy"):
        command(
            ServerSettings(host="0.0.0.0"), AuthSettings(auth="keys"), DashboardSettings()
        )  # which a browser does not send
    behind = command(ServerSettings(host="0.0.0.0"), AuthSettings(auth="proxy"), DashboardSettings())
    assert not any("allowedHosts" in flag for flag in behind)


def test_one_person_s_dashboard_in_a_container_answers_under_loopback_names_only() -> None:
    ann = DashboardSettings(person="Ann Lee")
    mine = command(ServerSettings(host="0.0.0.0"), AuthSettings(), ann)
    assert "--server.address=0.0.0.0" in mine
    assert {"--server.allowedHosts=127.0.0.1", "--server.allowedHosts=localhost"} <= set(mine)
    with pytest.raises(Forbidden, match="MEDLOOP_PERSON"):
        command(ServerSettings(host="0.0.0.0"), AuthSettings(auth="proxy"), ann)


@pytest.mark.parametrize("person", [None, "Ann Lee"])
def test_a_signature_that_nobody_would_check_is_no_silent_setting(person: str | None) -> None:
    checked = DashboardSettings(
        person=person,
        user_token_header="x-amzn-oidc-data",
        user_token_signer="arn:…",
        user_token_keys="https://keys.example",
    )
    with pytest.raises(Forbidden, match="MEDLOOP_USER_TOKEN_HEADER is checked only with MEDLOOP_AUTH=proxy"):
        command(ServerSettings(), AuthSettings(), checked)


def test_protections_are_on_and_nobody_is_told() -> None:
    flags = command(ServerSettings(max_body_bytes=2**20), AuthSettings(), DashboardSettings())
    for flag in (
        "--server.enableXsrfProtection=true",
        "--server.enableCORS=true",
        "--server.enableStaticServing=false",
        "--browser.gatherUsageStats=false",
        "--client.showErrorDetails=none",
        "--server.maxUploadSize=1",
    ):
        assert flag in flags


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_starts_with_everything_down_and_ends_on_a_signal(home: Path, number: signal.Signals) -> None:
    port = free_port()
    environment = {**os.environ, "MEDLOOP_PORT": str(port), "HOME": str(home)}
    process = subprocess.Popen([sys.executable, "-m", "medloop_dashboard"], env=environment, cwd=home)
    try:
        deadline = time.monotonic() + 60
        while not answers(port):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(timeout=60) in (0, -number)
    finally:
        process.kill()
        process.wait()
    assert not answers(port)


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/_stcore/health", timeout=1).is_success
    except httpx.TransportError:
        return False


def test_a_busy_port_is_one_sentence_and_a_status(home: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment = {**os.environ, "MEDLOOP_PORT": str(port)}
        ended = subprocess.run(
            [sys.executable, "-m", "medloop_dashboard"], env=environment, capture_output=True, text=True, timeout=60
        )
    assert ended.returncode == 11
    assert len(ended.stderr.splitlines()) == 1
    assert str(port) in ended.stderr


def test_pages_need_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from medloop_dashboard.screens import corrections, models, predict, runs\n"
        "from mlflow import MlflowClient\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.strip() == "[]"
