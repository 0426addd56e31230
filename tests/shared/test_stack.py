import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from medloop import stack
from medloop.errors import Conflict, PortInUse, StorageFull, StorageUnavailable, Unavailable
from medloop.settings import DEFAULT_PORTS
from medloop.stack import ProcessRef, Stack, StackState, choose_ports, read_state, stop_running


def start_sleeper(*code: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", ";".join(code) or "import time; time.sleep(60)"]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE if code else None)


def refer(process: subprocess.Popen[bytes]) -> ProcessRef:
    return ProcessRef(pid=process.pid, started=psutil.Process(process.pid).create_time())


def write_state(home: Path, **changes: object) -> StackState:
    fields = {"model": "m", "supervisor": ProcessRef(pid=1, started=0), "addresses": {}}
    state = StackState.model_validate({**fields, **changes})
    (home / stack.STATE_FILE).write_text(state.model_dump_json())
    return state


def test_automatic_ports_are_free_and_distinct() -> None:
    ports = choose_ports(automatic=True)
    assert ports.keys() == DEFAULT_PORTS.keys()
    assert len(set(ports.values())) == len(ports)


def test_a_busy_port_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        busy = listener.getsockname()[1]
        monkeypatch.setitem(DEFAULT_PORTS, "inference", busy)
        for name in DEFAULT_PORTS.keys() - {"inference"}:
            monkeypatch.setitem(DEFAULT_PORTS, name, 0)
        with pytest.raises(PortInUse, match=rf"Port {busy} \(inference\) is in use.*--ports auto"):
            choose_ports(automatic=False)


def test_a_full_disk_is_said_before_anything_starts(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "MIN_FREE_BYTES", 2**62)
    with pytest.raises(StorageFull, match="MEDLOOP_HOME"):
        Stack(home, "m", automatic_ports=True)
    assert read_state(home) is None


def test_a_home_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageUnavailable, match="cannot be made"):
        Stack(tmp_path / "file" / "home", "m", automatic_ports=True)


def test_a_damaged_state_file_is_named(home: Path) -> None:
    (home / stack.STATE_FILE).write_text("{")
    with pytest.raises(StorageUnavailable, match="damaged"):
        read_state(home)


def test_a_second_stack_from_the_same_home_is_refused(home: Path) -> None:
    me = psutil.Process()
    write_state(home, supervisor=ProcessRef(pid=me.pid, started=me.create_time()))
    with pytest.raises(Conflict, match="medloop down"):
        Stack(home, "m", automatic_ports=True)


def test_a_process_number_that_was_given_away_again_is_not_ours() -> None:
    assert ProcessRef(pid=os.getpid(), started=0.0).find() is None


def test_stopping_takes_the_children_of_services_too(home: Path) -> None:
    leader = start_sleeper(
        "import subprocess, sys, time",
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])",
        "print(p.pid, flush=True)",
        "time.sleep(60)",
    )
    assert leader.stdout is not None
    with leader.stdout as output:
        child = int(output.readline())
    write_state(home, services={"inference": refer(leader)})
    assert stop_running(home, lambda _: None)
    leader.wait(timeout=30)
    assert not psutil.pid_exists(child)
    assert read_state(home) is None
    assert not stop_running(home, lambda _: None)


def test_what_a_killed_supervisor_left_behind_is_ended_at_the_next_start(home: Path) -> None:
    orphan = start_sleeper()
    write_state(home, services={"evaluator": refer(orphan)})
    with Stack(home, "m", automatic_ports=True):
        assert orphan.poll() is not None


def test_a_service_that_ends_is_reported_with_the_end_of_its_log(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Stack(home, "m", automatic_ports=True) as running:
        (home / "logs" / "inference.log").write_text("the reason\n")
        running.start("inference")
        with pytest.raises(Unavailable, match=r"inference ended with exit status 1(.|\n)*the reason"):
            running.wait("inference", timeout=60)
