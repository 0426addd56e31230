"""All services on this machine: started in order, watched, stopped together, with their addresses written down.

`stack.json` in the home folder says what runs; the other commands find the addresses there. Each process has a group
of its own, so that what it started stops with it.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
import psutil
from pydantic import BaseModel, ValidationError

from medloop.errors import Conflict, PortInUse, StorageFull, StorageUnavailable, Unavailable
from medloop.settings import DEFAULT_PORTS

STATE_FILE = "stack.json"
MIN_FREE_BYTES = 500 * 2**20
"""Less free space than this, and a training run would end half way."""
STOP_SECONDS = 30.0
"""Before what still runs is killed; services take up to 25 s to stop."""

Report = Callable[[str], None]


class ProcessRef(BaseModel):
    """A process, told from a later one with the same number by when it started (seconds since 1970)."""

    pid: int
    started: float

    def find(self) -> psutil.Process | None:
        try:
            process = psutil.Process(self.pid)
            return process if abs(process.create_time() - self.started) < 1.0 else None
        except psutil.NoSuchProcess:
            return None


class StackState(BaseModel):
    """What runs from one home: the supervisor, the services and where they listen."""

    model: str
    supervisor: ProcessRef
    services: dict[str, ProcessRef] = {}
    addresses: dict[str, str]

    @property
    def running(self) -> bool:
        return self.supervisor.find() is not None


@dataclass(frozen=True, slots=True)
class Service:
    """How one process is started: its command line and what it needs in its environment."""

    name: str
    command: list[str]
    health: str
    environment: dict[str, str]


def read_state(home: Path) -> StackState | None:
    """What `stack.json` says; None when nothing was ever started here."""
    path = home / STATE_FILE
    try:
        return StackState.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as exc:
        raise StorageUnavailable(f"{path} is damaged; delete it and start again.") from exc


def choose_ports(automatic: bool) -> dict[str, int]:
    """The design's ports, or free ones. Raises PortInUse when a fixed one is taken."""
    held: list[socket.socket] = []
    ports: dict[str, int] = {}
    try:
        for name, port in DEFAULT_PORTS.items():
            listener = socket.socket()
            held.append(listener)
            # As the servers do: a port that only lingers from a closed connection is free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", 0 if automatic else port))
            except OSError as exc:
                raise PortInUse(
                    f"Port {port} ({name}) is in use: stop what listens there, or let MedLoop choose with --ports auto."
                ) from exc
            ports[name] = listener.getsockname()[1]
    finally:
        for listener in held:
            listener.close()
    return ports


def prepare_home(home: Path) -> None:
    """Make the home folder, and check that there is room in it."""
    try:
        for folder in (home, home / "logs", home / "mlflow"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        free = shutil.disk_usage(home).free
    except OSError as exc:
        raise StorageUnavailable(f"{home} cannot be made: {exc.strerror}. Set MEDLOOP_HOME to another folder.") from exc
    if free < MIN_FREE_BYTES:
        raise StorageFull(
            f"Only {free / 2**20:.0f} MiB are free at {home}; MedLoop needs {MIN_FREE_BYTES / 2**20:.0f}. "
            "Free some, or set MEDLOOP_HOME to another disk."
        )


def environment(home: Path, model: str, addresses: dict[str, str]) -> dict[str, str]:
    """What every process of the stack finds in its environment beside what the user has set."""
    return {
        "MEDLOOP_HOME": str(home),
        "MEDLOOP_MODEL": model,
        "MLFLOW_TRACKING_URI": addresses["mlflow"],
        **{f"MEDLOOP_{name.upper()}_URL": url for name, url in addresses.items() if name != "mlflow"},
        # Nothing is ever unpickled on a load path.
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # Its server's own background jobs (scoring of chats) would be more processes that nobody here asks for.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # Threads that wait for each other sleep: spinning would take the cores from the neighbours.
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONUNBUFFERED": "1",
    }


def _services(home: Path, model: str, ports: dict[str, int], addresses: dict[str, str]) -> list[Service]:
    shared = environment(home, model, addresses)
    mlflow_port = ports["mlflow"]
    mlflow = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(mlflow_port)),
        *("--workers", "1", "--backend-store-uri", f"sqlite:///{home / 'mlflow' / 'mlflow.sqlite'}"),
        *("--artifacts-destination", str(home / "mlflow" / "artifacts")),
        *("--allowed-hosts", f"127.0.0.1:{mlflow_port},localhost:{mlflow_port}"),
    ]
    services = [Service("mlflow", mlflow, "/health", shared)]
    for name, health in (
        ("inference", "/livez"),
        ("evaluator", "/livez"),
        ("explainer", "/livez"),
        ("dashboard", "/_stcore/health"),
    ):
        command = [sys.executable, "-m", f"medloop_{name}"]
        services.append(Service(name, command, health, {**shared, "MEDLOOP_PORT": str(ports[name])}))
    return services


class Stack:
    """The services of one home, as long as this process runs.

    Use it as a context manager: leaving it stops everything it started.
    """

    def __init__(self, home: Path, model: str, *, automatic_ports: bool = False) -> None:
        self.home = home.resolve()
        prepare_home(self.home)
        before = read_state(self.home)
        if before is not None and before.running:
            raise Conflict(
                f"MedLoop already runs from {self.home} (dashboard: {before.addresses.get('dashboard', '?')}). "
                "Stop it first with: medloop down"
            )
        if before is not None:
            _stop_all(before)  # what a killed supervisor left behind
        ports = choose_ports(automatic_ports)
        self.model = model
        self.addresses = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
        self._services = {s.name: s for s in _services(self.home, model, ports, self.addresses)}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        me = psutil.Process()
        self._state = StackState(
            model=model,
            supervisor=ProcessRef(pid=me.pid, started=me.create_time()),
            addresses=self.addresses,
        )
        self._write_state()

    def __enter__(self) -> "Stack":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, *names: str) -> None:
        """Start services by name (all that do not run yet, when none is named); does not wait for them."""
        for name in names or self._services:
            if name in self._processes:
                continue
            service = self._services[name]
            with self._open_log(name) as log:
                process = subprocess.Popen(  # noqa: S603 - our own command lines
                    service.command,
                    env={**os.environ, **service.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self._processes[name] = process
            self._state.services[name] = ProcessRef(pid=process.pid, started=psutil.Process(process.pid).create_time())
            self._write_state()

    def wait(self, *names: str, timeout: float = 180.0, path: str | None = None) -> None:
        """Wait until services answer; raises Unavailable, with the end of its log, when one ends or takes too long."""
        deadline = time.monotonic() + timeout
        for name in names or self._services:
            url = self.addresses[name] + (path or self._services[name].health)
            while not _answers(url):
                self.check(name)
                if time.monotonic() > deadline:
                    raise Unavailable(f"{name} did not answer within {timeout:.0f} s.{self._log_hint(name)}")
                time.sleep(0.1)

    def check(self, *names: str) -> None:
        """Raise Unavailable when a service that was started has ended."""
        for name in names or self._processes:
            process = self._processes.get(name)
            if process is not None and (status := process.poll()) is not None:
                raise Unavailable(f"{name} ended with exit status {status}.{self._log_hint(name)}")

    def stop(self) -> None:
        """Stop everything, ask first, then end it; returns when nothing is left."""
        _stop_all(self._state)
        for process in self._processes.values():
            process.wait()
        self._processes.clear()
        (self.home / STATE_FILE).unlink(missing_ok=True)

    def _open_log(self, name: str) -> IO[bytes]:
        return (self.home / "logs" / f"{name}.log").open("ab")

    def _log_hint(self, name: str) -> str:
        path = self.home / "logs" / f"{name}.log"
        lines = path.read_text(errors="replace").strip().splitlines()[-5:]
        return f" Its log, {path}, ends with:\n  " + "\n  ".join(line[:500] for line in lines)

    def _write_state(self) -> None:
        temporary = self.home / f"{STATE_FILE}.tmp"
        try:
            temporary.write_text(self._state.model_dump_json(indent=1))
            temporary.replace(self.home / STATE_FILE)
        except OSError as exc:
            raise StorageUnavailable(f"{self.home} cannot be written to: {exc.strerror}.") from exc


def stop_running(home: Path, report: Report) -> bool:
    """Stop what runs from `home`, from another process; returns whether anything did."""
    state = read_state(home)
    if state is None:
        return False
    supervisor = state.supervisor.find()
    if supervisor is not None:
        report(f"Stopping MedLoop (process {supervisor.pid}) …")
        supervisor.terminate()
        _, alive = psutil.wait_procs([supervisor], timeout=2 * STOP_SECONDS)
        for process in alive:
            process.kill()
    left = _stop_all(state)
    (home / STATE_FILE).unlink(missing_ok=True)
    return supervisor is not None or left > 0


def health(state: StackState) -> dict[str, dict[str, Any]]:
    """Of each service: its address, whether its process runs and whether it answers as ready."""
    found: dict[str, dict[str, Any]] = {}
    for name, url in state.addresses.items():
        process = state.services.get(name)
        path = {"mlflow": "/health", "dashboard": "/_stcore/health"}.get(name, "/readyz")
        found[name] = {
            "address": url,
            "running": process is not None and process.find() is not None,
            "ready": _answers(url + path),
        }
    return found


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2.0).is_success
    except httpx.TransportError:
        return False


def _stop_all(state: StackState) -> int:
    """End the services and everything in their sessions; returns how many processes there were."""
    # A child may have outlived its leader: its session still has the leader's number, unless that was given away again.
    sessions = {r.pid: r.started for r in state.services.values() if r.find() or not psutil.pid_exists(r.pid)}
    members = [p for p in psutil.process_iter() if _belongs(p, sessions)]
    for process in members:
        _signal(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(members, timeout=STOP_SECONDS)
    for process in alive:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=STOP_SECONDS)
    return len(members)


def _belongs(process: psutil.Process, sessions: dict[int, float]) -> bool:
    try:
        started = sessions.get(os.getsid(process.pid))
        # What a service started is younger than the service, and a machine that was started anew numbers anew.
        return started is not None and started > psutil.boot_time() and process.create_time() > started - 1.0
    except (ProcessLookupError, PermissionError, psutil.NoSuchProcess):
        return False


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
