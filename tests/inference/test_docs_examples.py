"""Every example of docs/api.md, run as a reader would, against the service as it is started."""

import json
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
from medloop.bundle import Bundle
from medloop.testing import TINY_CLASSES, free_port
from medloop_inference.champion import Watcher

Evaluator = Any  # the small one of conftest.py

REPOSITORY = Path(__file__).parents[2]
GUIDE = REPOSITORY / "docs" / "api.md"
EXAMPLE = re.compile(r"```(bash|python)\n(.*?)```\n+```(json|text)\n(.*?)```", re.DOTALL)
PHANTOM = "phantom-"
"""What the demo's classes begin with; the model of this test has others, and says nothing about phantoms."""


@pytest.fixture
def port(watcher: Watcher, evaluator: Evaluator, first: Bundle) -> Iterator[int]:
    """Where a process of the real service listens."""
    evaluator.champion(first)
    watcher.poll_once()
    port = free_port()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "MEDLOOP_MODEL": "tiny",
        "MEDLOOP_PORT": str(port),
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}",  # it starts from its disk
    }
    process = subprocess.Popen([sys.executable, "-m", "medloop_inference"], env=environment)
    try:
        deadline = time.monotonic() + 60
        while not _ready(port):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def _ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def run(language: str, source: str, port: int) -> str:
    source = source.replace("127.0.0.1:8080", f"127.0.0.1:{port}").replace("phantoms", "tiny")
    source = source.replace(".venv/bin/medloop", f"{sys.executable} -m medloop.cli")
    command = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "MEDLOOP_INFERENCE_URL": f"http://127.0.0.1:{port}",
    }
    done = subprocess.run(
        [*command, source], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(shown: Any, given: Any) -> None:
    """What is shown was given: the same names, numbers where there are numbers, and the same words but for classes,
    versions of them, and ids."""
    if isinstance(shown, dict):
        if all(name.startswith(PHANTOM) for name in shown):
            assert set(given) == set(TINY_CLASSES)
            return
        assert shown.keys() <= given.keys()
        for name, value in shown.items():
            if name in ("id", "decision") and isinstance(value, str) and " " not in value:
                assert isinstance(given[name], str)
            else:
                check(value, given[name])
    elif isinstance(shown, list) and not all(isinstance(value, str) for value in shown):
        assert len(shown) == len(given)
        for one, other in zip(shown, given, strict=True):
            check(one, other)
    elif isinstance(shown, list):
        assert given
        assert all(isinstance(value, str) for value in given)
    elif isinstance(shown, float):
        assert isinstance(given, float | int)
    elif isinstance(shown, str) and shown.startswith(PHANTOM):
        assert given in TINY_CLASSES
    else:
        assert given == ("tiny" if shown == "phantoms" else shown)


def test_every_example_gives_what_the_guide_shows(port: int, subtests: pytest.Subtests) -> None:
    examples = EXAMPLE.findall(GUIDE.read_text())
    assert len(examples) == len(re.findall(r"```(?:bash|python)\n", GUIDE.read_text())) >= 9
    for language, source, kind, shown in examples:
        with subtests.test(source=source):
            output = run(language, source, port)
            if kind == "json":
                check(json.loads(shown), json.loads(output))
                continue
            classes = "|".join(TINY_CLASSES)
            pattern = re.sub(rf"{PHANTOM}[a-z-]+", f"(?:{classes})", re.escape(shown).replace(r"\-", "-"))
            assert re.fullmatch(pattern.replace(r"1,\ 6", r"1,\ 2"), output)
