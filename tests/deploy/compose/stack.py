"""The stack under test, through Docker's own command line: one project with volumes, secrets and ports of its own."""

import http.client
import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medloop.testing import free_port

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).parent
UID = 10001
"""As whom containers run."""


class Failed(Exception):
    """A command failed, or something did not come in time; the message has the end of what was said."""


@dataclass
class Stack:
    """The Compose project `project`; what it writes on this machine lies in `folder`.

    With `lab`, stand-ins take the place of what no registry is there to give (lab.yml).
    """

    folder: Path
    lab: bool = False
    project: str = "medloop-journey"
    environment: dict[str, str] = field(default_factory=dict)
    more: list[Path] = field(default_factory=list)
    """Further files of Compose's."""

    def __post_init__(self) -> None:
        self.records = self.folder / "records"
        self.records.mkdir(exist_ok=True)
        if self.lab:
            os.chown(self.records, UID, UID)
        self.env_file = self.folder / ".env"
        run(["sh", str(ROOT / "infra" / "compose" / "env.sh"), str(self.env_file)])
        published = {f"PUBLISH_{name}": str(free_port()) for name in ("MLFLOW", "INFERENCE", "DASHBOARD")}
        self.environment = {**published, "LAB_FOLDER": str(self.records), **self.environment}

    @property
    def secrets(self) -> dict[str, str]:
        lines = self.env_file.read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))

    def compose(self, *arguments: str, timeout: float = 300.0, **environment: str) -> str:
        """What `docker compose` prints; raises Failed."""
        lab = [HERE / "lab.yml"] if self.lab else []
        files = [ROOT / "docker-compose.yml", *lab, HERE / "journey.yml", *self.more]
        options = [part for file in files for part in ("--file", str(file))]
        command = ["docker", "compose", "--project-name", self.project, "--env-file", str(self.env_file), *options]
        return run([*command, *arguments], timeout=timeout, environment={**self.environment, **environment})

    def up(self, *arguments: str, timeout: float = 600.0) -> None:
        self.compose("up", "--detach", "--wait", "--wait-timeout", str(int(timeout)), *arguments, timeout=timeout + 60)

    def down(self) -> None:
        self.compose("--profile", "jobs", "down", "--volumes", "--remove-orphans")

    def medloop(self, *arguments: str, key: str = "", volume: str | None = None) -> dict[str, Any]:
        """The result of a command of `medloop`, in a one-off container."""
        options = ["--volume", volume] if volume else []
        said = self.compose(
            "run", "--rm", "--no-deps", "-T", *options, "cli", *arguments, "--json", MEDLOOP_API_KEY=key
        )
        found: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
        return found

    def containers(self, service: str) -> list[str]:
        """Of a service, in the order of their numbers, whether they run or not."""
        return sorted(
            self.compose("ps", "--all", "--quiet", service).split(), key=lambda one: str(inspect(one)["Name"])
        )

    def container(self, service: str) -> str:
        return self.containers(service)[0]

    def address(self, container: str, port: int = 8080) -> str:
        """`host:port` on this machine; another after every start where the port was left to Docker."""
        return run(["docker", "port", container, str(port)]).split()[0]


def inspect(container: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(["docker", "inspect", container]))[0]
    return found


def docker(*arguments: str) -> str:
    return run(["docker", *arguments])


def healthy(container: str) -> bool:
    state = inspect(container)["State"]
    return bool(state["Running"]) and state.get("Health", {}).get("Status", "healthy") == "healthy"


def answers(address: str, path: str, *, headers: dict[str, str] | None = None) -> int:
    """The status of a GET; 0 when there was no answer."""
    connection = http.client.HTTPConnection(address, timeout=5)
    try:
        connection.request("GET", path, headers=headers or {})
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 120.0) -> float:
    """Wait for `condition`; the seconds that took. Raises Failed."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > timeout:
            raise Failed(f"Not within {timeout:.0f} s: {what}.")
        time.sleep(0.25)
    return time.monotonic() - started


def run(command: list[str], *, timeout: float = 120.0, environment: dict[str, str] | None = None) -> str:
    """What a command prints on standard output; raises Failed with the end of what it said otherwise."""
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **(environment or {})}, capture_output=True, text=True, timeout=timeout
    )
    if done.returncode != 0:
        said = "\n".join((done.stderr + done.stdout).strip().splitlines()[-12:])
        raise Failed(f"{' '.join(command[:2])} … {' '.join(command[-4:])} ended with {done.returncode}:\n{said}")
    return done.stdout
