"""A discrete-event simulation of a cluster: requests, pods, the metrics that are read of them, the autoscaler, nodes.

Arrivals are a Poisson stream whose rate changes with time. Each goes to one of the pods in rotation, by chance, which
is a little worse than a balancer's turns: a stream that is split by chance is a Poisson stream for each pod. Whoever is
refused does not come again.

Large fleets are simulated by a sample: one simulated pod stands for `stands_for` equal ones, while the autoscaler and
the nodes count all of them.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import simpy

from benchmarks.scaling.assumptions import Times
from benchmarks.scaling.autoscaler import Autoscaler, Kind, Reading, Settings
from benchmarks.scaling.pod import Pod, Work

SLICE_S = 0.1
"""How far a pod works ahead before the rate and the pods in rotation are looked at again."""
BUCKET_S = 10.0
"""Of time, for telling when things went well again."""
LONG_S = 3600.0
"""How long those pods have been there that a story begins with."""

Process: TypeAlias = Generator[simpy.Event, Any, None]
Rate: TypeAlias = Callable[[float], float]


@dataclass(frozen=True, slots=True)
class Fleet:
    """What is simulated. `pods` run at the start, on `nodes`; a pod requests `request` processors and works with
    `speed` of one in each of its runs; `ready_s` is from a container that runs to one that answers. Without
    `custom_metrics` the autoscaler asks for the queue in vain."""

    work: Work
    speed: float
    request: float
    pods: int
    nodes: int
    pods_a_node: int
    node_price: float
    settings: Settings
    target_ms: float
    ready_s: float
    stands_for: int = 1
    custom_metrics: bool = True


@dataclass(slots=True)
class Bucket:
    """What came of the requests that came within some seconds."""

    came: int = 0
    in_target: int = 0
    refused: int = 0

    @property
    def good(self) -> float:
        return self.in_target / self.came if self.came else 1.0


@dataclass(slots=True, eq=False)
class _Member:
    """One simulated pod's life; times are None until they have come."""

    created: float
    runs_since: float | None = None
    ready: float | None = None
    serves: bool = False
    gone: bool = False
    pod: Pod | None = None
    looked: float | None = None  # when the resource metrics last did
    busy_s: float = 0.0  # as they saw it then
    cpu: tuple[float, float] | None = None  # the last figure, and when it was taken
    queue: deque[tuple[float, float]] = field(default_factory=deque)  # figures, and when they were taken


class Cluster:
    """Runs one story of `rate` (requests a second, of all pods, at a second) with the random numbers of `seed`.

    After `run`, `buckets` say what came of the requests, `history` has (second, pods), and `nodes` how many there
    were at last; none is taken away within a story, which is shorter than the minutes a cluster waits with that.
    """

    def __init__(self, fleet: Fleet, rate: Rate, times: Times, seed: int) -> None:
        self._fleet, self._rate, self._times = fleet, rate, times
        self._random = np.random.default_rng(seed)
        self._env = simpy.Environment()
        self._autoscaler = Autoscaler(fleet.settings)
        self._members: list[_Member] = []
        self.nodes = fleet.nodes
        self._room: list[tuple[float, int]] = [(0.0, self.nodes * fleet.pods_a_node)]  # up at, pods that fit
        self.buckets: dict[int, Bucket] = defaultdict(Bucket)
        self.history: list[tuple[float, int]] = []
        self.node_seconds = 0.0

    @property
    def pods(self) -> int:
        return len(self._members) * self._fleet.stands_for

    def run(self, seconds: float) -> None:
        for _ in range(math.ceil(self._fleet.pods / self._fleet.stands_for)):
            self._place()
            member = _Member(-LONG_S, 0.0, -LONG_S, serves=True, pod=self._pod())
            self._members.append(member)
        self.history.append((0.0, self.pods))
        kinds = {metric.kind for metric in self._fleet.settings.metrics}
        self._env.process(self._traffic())
        if "cpu" in kinds:
            self._env.process(self._every(self._times.resource_metrics, self._look_at_cpu))
        if "queue-wait" in kinds and self._fleet.custom_metrics:
            self._env.process(self._every(self._times.custom_metrics, self._look_at_queues))
        self._env.process(self._every(self._times.sync, self._autoscale))
        self._env.run(until=seconds)
        for member in self._members:
            if member.pod is not None:
                member.pod.finish()

    def _pod(self) -> Pod:
        work, speed = self._fleet.work, self._fleet.speed
        slowed = Work(lambda images: work.batch_s(images) / speed, work.at_once)
        return Pod(slowed, self._fleet.target_ms, self._tell)

    def _tell(self, at: float, seconds: float | None) -> None:
        bucket = self.buckets[int(at // BUCKET_S)]
        bucket.came += 1
        if seconds is None:
            bucket.refused += 1
        elif seconds * 1000 <= self._fleet.target_ms:
            bucket.in_target += 1

    # Processes.

    def _every(self, seconds: float, do: Callable[[], None]) -> Process:
        yield self._env.timeout(self._random.uniform(0, seconds))  # nobody's clocks agree
        while True:
            do()
            yield self._env.timeout(seconds)

    def _traffic(self) -> Process:
        while True:
            now = self._env.now
            pods = [member.pod for member in self._members if member.serves and member.pod is not None]
            expected = self._rate(now) / self._fleet.stands_for * SLICE_S
            if not pods:
                self.buckets[int(now // BUCKET_S)].came += int(self._random.poisson(expected))
            for pod, count in zip(pods, self._random.poisson(expected / max(1, len(pods)), len(pods)), strict=True):
                arrivals = now + SLICE_S * np.sort(self._random.random(count))
                pod.serve(arrivals.tolist(), now + SLICE_S)
            self.node_seconds += self.nodes * SLICE_S
            yield self._env.timeout(SLICE_S)

    def _live(self, member: _Member, up_at: float) -> Process:
        times = self._times
        yield self._env.timeout(max(0.0, up_at - self._env.now) + times.schedule)
        member.runs_since = self._env.now
        yield self._env.timeout(times.bundle + self._fleet.ready_s)
        member.ready, member.pod = self._env.now, self._pod()
        yield self._env.timeout(times.register)
        member.serves = not member.gone

    # Looks.

    def _look_at_cpu(self) -> None:
        now = self._env.now
        for member in self._members:
            if member.runs_since is None:
                continue
            since, member.looked = member.looked or member.runs_since, now
            busy = member.pod.busy_s(now) if member.pod is not None else 0.0
            used, member.busy_s = (busy - member.busy_s) * self._fleet.speed, busy
            if now - since >= self._times.resource_metrics / 2:
                member.cpu = (used / (now - since) / self._fleet.request, now)

    def _look_at_queues(self) -> None:
        for member in self._members:
            if member.pod is not None:
                member.queue.append((member.pod.queue_wait, self._env.now))

    def _reading(self, member: _Member, kind: Kind) -> Reading:
        if member.runs_since is None:
            return Reading(ignored=True)
        now, times = self._env.now, self._times
        if kind == "queue-wait":
            while member.queue and member.queue[0][1] <= now - times.custom_window:
                member.queue.popleft()
            return Reading(max((value for value, _ in member.queue), default=None))
        if member.cpu is None:
            return Reading()
        value, at = member.cpu
        young = now - member.created < times.young
        if member.ready is None or (young and at < member.ready + times.resource_metrics):
            return Reading(ignored=True)
        return Reading(value)

    def _autoscale(self) -> None:
        fleet = self._fleet
        known = [
            (metric, [self._reading(member, metric.kind) for member in self._members] * fleet.stands_for)
            for metric in fleet.settings.metrics
        ]
        wanted = self._autoscaler.sync(self._env.now, self.pods, known)
        simulated = min(math.ceil(wanted / fleet.stands_for), fleet.settings.maximum // fleet.stands_for)
        while len(self._members) < simulated:
            member = _Member(self._env.now)
            self._members.append(member)
            self._env.process(self._live(member, self._place()))
        if len(self._members) > simulated:
            # As a ReplicaSet: who is not ready goes first, then the youngest.
            self._members.sort(key=lambda member: (not member.serves, member.created))
            leaving, self._members = self._members[simulated:], self._members[:simulated]
            for member in leaving:
                self._leave(member)
        if self.pods != self.history[-1][1]:
            self.history.append((self._env.now, self.pods))

    def _leave(self, member: _Member) -> None:
        member.gone, member.serves = True, False
        self._room.insert(0, (self._env.now, self._fleet.stands_for))
        if member.pod is not None:
            member.pod.finish()

    def _place(self) -> float:
        """Room for one simulated pod; when the last of its nodes is up."""
        needed, up_at = self._fleet.stands_for, 0.0
        while needed:
            if not self._room:
                self.nodes += 1
                self._room.append((self._env.now + self._times.node + self._times.pull, self._fleet.pods_a_node))
            since, room = self._room[0]
            taken = min(needed, room)
            needed, up_at = needed - taken, max(up_at, since)
            self._room[0] = (since, room - taken)
            if room == taken:
                self._room.pop(0)
        return up_at
