"""The process as it is started: what it loads, what it says when it cannot run."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from medloop.bundle import Bundle
from medloop.settings import HomeSettings
from medloop.testing import free_port
from medloop_inference.champion import Watcher

Evaluator = Any  # the small one of conftest.py

# pandas and scipy are not among them: MLflow's light client takes them along where they happen to be installed.
HEAVY = ("torch", "torchvision", "sklearn", "matplotlib", "flask", "sqlalchemy", "mlflow.server", "mlflow.pyfunc")
LATE = ("mlflow", "boto3", "pymongo", "pandas", "pyarrow", "pydicom", "openvino")
SCRIPT = """
import sys
from medloop.registry import Registry
from medloop.settings import HomeSettings
from medloop_inference.app import create_app
from medloop_inference.champion import Watcher
from medloop_inference.settings import Settings
settings = Settings()
app = create_app(settings)
when_told = []
def report(reason):
    when_told.append((reason, [name for name in %r if name in sys.modules]))
watcher = Watcher("tiny", Registry(settings.tracking.tracking_uri), settings.home, report=report)
watcher.poll_once()
assert watcher.current is not None
assert "mlflow" in sys.modules
print(when_told[0])
print([name for name in %r if name in sys.modules])
"""


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_it_runs_without_torch_and_is_ready_before_it_loads_what_can_wait(
    watcher: Watcher, evaluator: Evaluator, first: Bundle
) -> None:
    evaluator.champion(first)
    watcher.poll_once()
    nowhere = f"http://127.0.0.1:{free_port()}"
    process = start(
        ["-c", SCRIPT % (LATE, HEAVY)],
        MEDLOOP_MODEL="tiny",
        MLFLOW_TRACKING_URI=nowhere,
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
    )
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert output.splitlines()[-2:] == ["(None, [])", "[]"]


def test_it_serves_from_its_disk_until_it_is_told_to_stop(
    watcher: Watcher, evaluator: Evaluator, first: Bundle, grey: Callable[..., bytes]
) -> None:
    evaluator.champion(first)
    watcher.poll_once()
    port = free_port()
    process = start(
        ["-m", "medloop_inference"],
        MEDLOOP_MODEL="tiny",
        MEDLOOP_PORT=str(port),
        MLFLOW_TRACKING_URI=f"http://127.0.0.1:{free_port()}",
    )
    try:
        wait_ready(f"http://127.0.0.1:{port}", process)
        answer = httpx.post(
            f"http://127.0.0.1:{port}/v1/predict", content=grey(255), headers={"content-type": "image/png"}
        )
        assert answer.json()["label"] == "bright"
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode in (0, -signal.SIGTERM)
    assert "Traceback" not in errors
    records = HomeSettings().home / "records.sqlite"
    assert records.is_file()  # the answer's record was written before the process ended


def wait_ready(url: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz").status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    pytest.fail(f"not ready: {process.communicate(timeout=5)[1] if process.poll() is not None else 'too slow'}")


def test_without_a_model_s_name_it_says_so(home: object) -> None:
    process = start(["-m", "medloop_inference"])
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3
    assert errors.strip() == "MEDLOOP_MODEL is not set as it must be: Field required."
