"""The real thing, once for all end-to-end tests: `medloop demo` on a few phantoms, staying up."""

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from medloop.registry import Registry

START_SECONDS = 420
EPOCHS = 2


@dataclass
class RunningStack:
    """What `medloop demo --json` printed, and where it runs."""

    home: Path
    document: dict[str, Any]
    process: subprocess.Popen[str]
    environment: dict[str, str] = field(repr=False)

    @property
    def addresses(self) -> dict[str, str]:
        return dict(self.document["addresses"])

    @property
    def model(self) -> str:
        return str(self.document["model"]["name"])

    @property
    def registry(self) -> Registry:
        return Registry(self.addresses["mlflow"])

    def medloop(self, *arguments: str, check: bool = True) -> dict[str, Any]:
        """Run a command of the command line with `--json`; returns what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "medloop.cli", *arguments, "--json"],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert not check or done.returncode == 0, done.stderr + done.stdout
        return {"status": done.returncode, **json.loads(done.stdout)}


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    folder = tmp_path_factory.mktemp("stack")
    home = folder / ".medloop"
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MEDLOOP_", "MLFLOW_"))}
    environment = {**inherited, "MEDLOOP_HOME": str(home)}
    command = [sys.executable, "-m", "medloop.cli", "demo", "--ports", "auto", "--epochs", str(EPOCHS), "--json"]
    with (folder / "demo.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
    try:
        line = _read_line(process, START_SECONDS)
        if not line:
            pytest.fail(f"medloop demo printed nothing:\n{(folder / 'demo.log').read_text()[-4000:]}")
        yield RunningStack(home, json.loads(line), process, environment)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        assert [child for child in children if child.is_running()] == []
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=60)
        if process.stdout is not None:
            process.stdout.close()


def _read_line(process: "subprocess.Popen[str]", timeout: float) -> str:
    if process.stdout is None:
        return ""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        return process.stdout.readline() if selector.select(timeout) else ""
