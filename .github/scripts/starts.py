"""`python starts.py SERVICE`: start a service in this environment, wait until it answers, and stop it.

The environment holds that service's lock and nothing else, and no store answers: what the lock leaves out ends the
process. The trainer is a job and only says what it can do.
"""

import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

START_SECONDS = 120.0
STOP_SECONDS = 30.0


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
    return port


def answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def serves(service: str, home: Path) -> int:
    """The exit status of a service that answered and was then told to stop."""
    port = free_port()
    environment = os.environ | {"MEDLOOP_HOME": str(home), "MEDLOOP_PORT": str(port), "MEDLOOP_MODEL": "demo"}
    path = "/_stcore/health" if service == "dashboard" else "/livez"
    process = subprocess.Popen([sys.executable, "-m", f"medloop_{service}"], env=environment, cwd=home)  # noqa: S603 - ours
    deadline = time.monotonic() + START_SECONDS
    try:
        while not answers(port, path):
            if process.poll() is not None:
                sys.exit(f"{service} ended with status {process.returncode} before it answered.")
            if time.monotonic() > deadline:
                sys.exit(f"{service} did not answer {path} within {START_SECONDS:.0f} s.")
            time.sleep(0.2)
        process.terminate()
        status = process.wait(STOP_SECONDS)
        return 0 if status == -signal.SIGTERM else status  # uvicorn finishes, then lets the signal have its way
    finally:
        process.kill()


def main(service: str) -> int:
    if service == "trainer":
        return subprocess.run([sys.executable, "-m", "medloop_trainer", "train", "--help"], check=False).returncode
    with tempfile.TemporaryDirectory() as home:
        return serves(service, Path(home))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
