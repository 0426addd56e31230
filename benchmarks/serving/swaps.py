"""Whether every answer is the right one: to its own image, by the version that it names, while versions change.

Two counts. Ten thousand different images, 64 in flight, against what the bare engine says to each. Then two replicas
behind clients that use whichever is ready and never ask twice, while the champion changes ten times and one replica
is restarted.
"""

import hashlib
import json
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from select import select

import numpy as np
from medloop.bundle import read_bundle
from medloop.testing import free_port
from medloop.vision.encode import encode_png

from benchmarks.serving import floor, load
from benchmarks.serving.bench import Bench
from benchmarks.serving.loop import answers, second_home
from benchmarks.serving.models import files
from benchmarks.serving.process import Server
from benchmarks.serving.servers import KINDS, OURS, Kind
from benchmarks.serving.wire import request_bytes

MODEL, NEXT = "tiny64", "tiny64-next"
IMAGES, IN_FLIGHT = 10_000, 64
FLIPS, RESTART_AT = 10, 5
CLIENTS = 8
TOLERANCE = 1e-5
"""Batches change float32 sums by about 1e-7; another image's answer lies further off."""


def compare(bench: Bench, kinds: Sequence[Kind], repeats: int, seconds: float) -> dict[str, float]:
    return _distinct_images(bench) | _changing_versions(bench, seconds)


def distinct_images(count: int) -> list[bytes]:
    """Smooth random PNGs of 64 px, cheap to make, all different."""
    grids = np.random.default_rng(5).integers(0, 256, (count, 8, 8), dtype=np.uint8)
    return [encode_png(np.kron(grid, np.ones((8, 8), np.uint8))) for grid in grids]


def _distinct_images(bench: Bench) -> dict[str, float]:
    images = distinct_images(IMAGES)
    expected = np.array(bench.fresh(floor.probabilities, bench.model(MODEL) / "bundle", images))
    requests = [request_bytes("/v1/predict", image, "image/png") for image in images]
    # This many in flight may well be more than the target allows; refusing is not what is counted here.
    with bench.running(KINDS[OURS], MODEL, {"MEDLOOP_TARGET_MS": "60000"}) as server:
        outcome = bench.apart(load.closed_loop, server.port, requests, IN_FLIGHT, keep=True)
    answered = [
        (index, json.loads(body))
        for index, status, body in zip(outcome.indices, outcome.statuses, outcome.bodies, strict=True)
        if status == 200
    ]
    swapped = 0
    for index, answer in answered:
        found = np.array(list(answer["probabilities"].values()))
        own = answer["image_hash"] == hashlib.sha256(images[index]).hexdigest()
        swapped += not (own and np.abs(found - expected[index]).max() <= TOLERANCE)
    return {"swapped_answers": swapped, "swapped_answers_of": len(answered)}


@dataclass(slots=True)
class Seen:
    """What the clients saw. `answers` are (image, version, digest, probabilities)."""

    answers: list[tuple[int, str, str, list[float]]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    turned_away: int = 0  # a replica that had stopped listening: nothing was sent, the other one was asked


class Clients:
    """Threads that ask replicas in turns, each only while its `/readyz` says so; nothing is ever asked twice."""

    def __init__(self, ports: Sequence[int], images: Sequence[tuple[bytes, str]]) -> None:
        self._ports, self._images = ports, images
        self._ready = dict.fromkeys(ports, True)
        self._stop = threading.Event()
        self.seen = Seen()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]
        self._threads += [threading.Thread(target=self._watch, args=(port,)) for port in ports]

    def __enter__(self) -> Seen:
        for thread in self._threads:
            thread.start()
        return self.seen

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _watch(self, port: int) -> None:
        while not self._stop.wait(0.05):
            self._ready[port] = answers(f"127.0.0.1:{port}", "/readyz")

    def _ask(self, number: int) -> None:
        connections = {port: HTTPConnection("127.0.0.1", port, timeout=30) for port in self._ports}
        turn = number
        while not self._stop.wait(0.004):
            turn += 1
            ready = [port for port in self._ports if self._ready[port]]
            if not ready:
                self.seen.failures.append("no replica is ready")
                continue
            self._ask_one(connections[ready[turn % len(ready)]], turn % len(self._images))
        for connection in connections.values():
            connection.close()

    def _ask_one(self, connection: HTTPConnection, index: int) -> None:
        if connection.sock is not None and select([connection.sock], [], [], 0)[0]:
            connection.close()  # the server ended it while it was idle; every pool of connections looks
        if connection.sock is None:
            try:
                connection.connect()
            except ConnectionRefusedError:
                self.seen.turned_away += 1
                return
        image, media_type = self._images[index]
        try:
            connection.request("POST", "/v1/predict", image, {"content-type": media_type})
            response = connection.getresponse()
            body = response.read()
        except (OSError, HTTPException) as exc:
            connection.close()
            self.seen.failures.append(repr(exc))
            return
        if response.status != 200:
            self.seen.failures.append(f"{response.status}: {body[:200]!r}")
            return
        answer = json.loads(body)
        model, found = answer["model"], list(answer["probabilities"].values())
        self.seen.answers.append((index, model["version"], model["bundle_digest"], found))


def _changing_versions(bench: Bench, seconds: float) -> dict[str, float]:
    home, registrar, version = bench.home(MODEL)
    bundles = {name: read_bundle(bench.model(name) / "bundle") for name in (MODEL, NEXT)}
    versions = {version: MODEL, registrar.register(bundles[NEXT]): NEXT}
    other = bench.scratch("second-replica") / ".medloop"
    second_home(home, other)
    ports = [free_port(), free_port()]
    with ExitStack() as stack:
        replicas = [
            stack.enter_context(_replica(bench, port, where)) for port, where in zip(ports, (home, other), strict=True)
        ]
        for replica, port in zip(replicas, ports, strict=True):
            _await_ready(replica, port)
        clients = Clients(ports, files(MODEL))
        with clients as seen:
            for flip in range(FLIPS):
                name = list(versions)[(flip + 1) % 2]
                registrar.approve(bundles[versions[name]], name)
                time.sleep(max(1.0, seconds / 5))
                if flip == RESTART_AT:
                    replicas[0].stop()
                    _await_ready(stack.enter_context(_replica(bench, ports[0], home)), ports[0])
    known = {(number, bundles[name].digest): bench.expected(name) for number, name in versions.items()}
    wrong = sum(not _right(known, *answer) for answer in seen.answers)
    for failure in sorted(set(seen.failures)):
        print("failed:", failure)
    return {
        "failed_during_swaps": len(seen.failures),
        "wrong_version_answers": wrong,
        "swaps.answers": len(seen.answers),
        "swaps.versions_seen": len({number for _, number, _, _ in seen.answers}),
        "swaps.turned_away_before_sending": seen.turned_away,
    }


def _replica(bench: Bench, port: int, home: Path) -> Server:
    # Whoever spreads requests needs a moment to notice that a replica is not ready any more.
    variables = {"MEDLOOP_POLL_SECONDS": "0.2", "MEDLOOP_DRAIN_SECONDS": "1"}
    return bench.server(KINDS[OURS], MODEL, port, variables, home)


def _await_ready(server: Server, port: int) -> None:
    server.wait_ready(lambda: answers(f"127.0.0.1:{port}", "/readyz"))


def _right(
    known: dict[tuple[str, str], list[list[float]]], index: int, version: str, digest: str, found: list[float]
) -> bool:
    expected = known.get((version, digest))
    return expected is not None and float(np.abs(np.subtract(found, expected[index])).max()) <= TOLERANCE
