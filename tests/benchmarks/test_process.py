"""CPU and memory of a tree, and that nothing of it is left."""

import os
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.serving.process import Server

BURN = """
import os, sys, time
def burn(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until: pass
"""
GRANDCHILDREN = f"""{BURN}
if os.fork() == 0:
    burn(0.3)          # waited for: counts with its parent
    os._exit(0)
os.wait()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        burn(0.3)      # left the session and its parent, and lives on
        held = bytearray(80 << 20)
        open(sys.argv[1], "w").close()
        time.sleep(60)
    os._exit(0)
os.wait()
time.sleep(60)
"""


@pytest.fixture
def done(tmp_path: Path) -> Path:
    return tmp_path / "done"


def test_the_whole_tree_counts_and_the_whole_tree_ends(tmp_path: Path, done: Path) -> None:
    with Server([sys.executable, "-c", GRANDCHILDREN, str(done)], {}, tmp_path / "log") as server:
        server.wait_ready(done.exists, timeout=30)
        pids = server.pids()
        assert len(pids) == 2
        assert 0.55 <= server.cpu_seconds() <= 1.5
        memory = server.memory()
        assert memory.rss >= memory.pss >= 80 << 20
    assert not [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]


def test_idle_time_costs_nothing(tmp_path: Path) -> None:
    with Server([sys.executable, "-c", "import time; time.sleep(60)"], {}, tmp_path / "log") as server:
        server.wait_ready(lambda: bool(server.pids()))
        assert server.cpu_seconds() < 0.5
        assert os.getpid() not in server.pids()


def test_a_server_that_ends_early_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('the port is taken')"]
    with Server(command, {}, tmp_path / "log") as server, pytest.raises(RuntimeError, match="the port is taken"):
        server.wait_ready(lambda: False, timeout=30)
