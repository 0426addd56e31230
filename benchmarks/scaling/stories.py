"""Bursts and ramps, told to the simulated cluster, and what came of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.scaling.assumptions import Times
from benchmarks.scaling.cluster import BUCKET_S, Cluster, Fleet
from benchmarks.scaling.manifest import PodSize
from benchmarks.scaling.measured import Network
from benchmarks.scaling.plan import Site, pods_for
from benchmarks.scaling.pod import Work

BEFORE_S, BURST_S, AFTER_S = 30.0, 180.0, 60.0
RAMP_S = 900.0
LOWEST = 0.25
"""Of the rate, at night."""
GOOD = 0.99
"""The share answered in target at which things count as well again."""
MOST_PODS, FEWEST_PODS = 24, 3
"""Simulated at the start; of larger fleets each pod stands for several."""
MOST_A_SECOND = 8_000.0
"""Requests that are simulated at the start, which takes the time: as few pods of a large fleet as keep to that."""
SPARE = 4
"""Where the manifest's maxReplicas is less than three times the plan's pods, it is taken as so many times those: it has
to be set anew there in any case, and what a burst does to a fleet that may not grow is known without simulation."""


@dataclass(frozen=True, slots=True)
class Story:
    """`factor` is the rate's at a second, from the plan's; what is told is of the requests between `since` and
    `until`."""

    name: str
    factor: Callable[[float], float]
    seconds: float
    since: float
    until: float
    starts_at: float = 1.0  # the fleet is the one for this factor
    custom_metrics: bool = True


@dataclass(frozen=True, slots=True)
class Told:
    """Shares are of the requests of the story's own time; `recovered_s` from its beginning, 0 where nothing went wrong,
    infinite where that had not ended with the story. `dollars` an hour are those of inference's nodes, on average."""

    in_target: float
    refused: float
    pods: int
    most_pods: int  # maxReplicas
    peak_pods: int
    peak_nodes: int
    dollars: float
    recovered_s: float
    simulated: int  # requests
    stands_for: int


def burst(times: int, *, custom_metrics: bool = True) -> Story:
    def factor(at: float) -> float:
        return times if BEFORE_S <= at < BEFORE_S + BURST_S else 1.0

    name, end = f"burst ×{times}{'' if custom_metrics else ', CPU alone'}", BEFORE_S + BURST_S
    return Story(name, factor, end + AFTER_S, BEFORE_S, end, custom_metrics=custom_metrics)


def _ramp(at: float) -> float:
    return LOWEST + (1 - LOWEST) * (1 - math.cos(math.pi * at / RAMP_S)) / 2


STORIES = (
    Story("steady", lambda at: 1.0, 150.0, 30.0, 150.0),
    burst(3),
    burst(3, custom_metrics=False),
    burst(10),
    Story("morning", _ramp, RAMP_S, 0.0, RAMP_S, starts_at=LOWEST),
)
"""The last one is a day's slope in a quarter of an hour: from a quarter of the rate to all of it."""


def tell(story: Story, rate: float, fleet: Fleet, times: Times, seed: int = 0) -> Told:
    """Simulate the story at `rate` requests a second."""
    cluster = Cluster(fleet, lambda at: rate * story.factor(at), times, seed)
    cluster.run(story.seconds)
    buckets = {number: bucket for number, bucket in cluster.buckets.items() if number * BUCKET_S >= story.since}
    own = [bucket for number, bucket in buckets.items() if number * BUCKET_S < story.until]
    came = sum(bucket.came for bucket in own)
    bad = [number for number, bucket in buckets.items() if bucket.good < GOOD]
    recovered = (max(bad) + 1) * BUCKET_S - story.since if bad else 0.0
    return Told(
        in_target=sum(bucket.in_target for bucket in own) / came,
        refused=sum(bucket.refused for bucket in own) / came,
        pods=cluster.history[0][1],
        most_pods=fleet.settings.maximum,
        peak_pods=max(pods for _, pods in cluster.history),
        peak_nodes=cluster.nodes,
        dollars=cluster.node_seconds / story.seconds * fleet.node_price,
        recovered_s=recovered if recovered < story.seconds - story.since else math.inf,
        simulated=sum(bucket.came for bucket in cluster.buckets.values()),
        stands_for=fleet.stands_for,
    )


def fleet(network: Network, rate: float, story: Story, site: Site, *, target_ms: float, ready_s: float) -> Fleet:
    """The pods that the plan has for the story's beginning."""
    planned, pods = pods_for(network, rate, site), pods_for(network, rate * story.starts_at, site)
    stands_for = math.ceil(pods / sample_of(pods, rate * story.starts_at))
    settings = site.autoscaler
    if settings.maximum < 3 * planned:
        settings = replace(settings, maximum=SPARE * planned)
    at_once = network.at_once(site.pod.cpu_limit)
    # The kind of node that the plan has for the whole rate.
    node, _ = site.nodes(planned)
    return Fleet(
        work=Work(network.batch_s, at_once),
        speed=speed(site.pod, at_once),
        request=site.pod.cpu,
        pods=pods,
        nodes=max(2, math.ceil(pods / site.pods_on(node))),
        pods_a_node=site.pods_on(node),
        node_price=node.price,
        settings=settings,
        target_ms=target_ms,
        ready_s=ready_s,
        stands_for=stands_for,
        custom_metrics=story.custom_metrics,
    )


def sample_of(pods: int, rate: float) -> int:
    """How many pods are simulated of so many at `rate` requests a second."""
    most = int(max(FEWEST_PODS, min(MOST_PODS, MOST_A_SECOND / (rate / pods))))
    if pods <= most:
        return pods
    # Of samples about as large, the one that says the number of pods most closely.
    return min(range(most, most * 2 // 3, -1), key=lambda count: -pods % count)


def speed(pod: PodSize, at_once: int) -> float:
    """Of one of a pod's runs, as a fraction of a processor: what the pod requests is all it has on a full node."""
    return min(1.0, pod.cpu / at_once)
