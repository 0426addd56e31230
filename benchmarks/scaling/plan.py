"""Arithmetic: from a rate of predictions to pods, nodes, dollars a month, and what gives way first."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from medloop_inference.settings import RecordingSettings, ServingSettings

from benchmarks.scaling.assumptions import GIB, HOURS_A_MONTH, NODES, SECONDS_A_MONTH, Bounds, Node, Prices
from benchmarks.scaling.autoscaler import Settings
from benchmarks.scaling.manifest import PodSize
from benchmarks.scaling.measured import Network
from benchmarks.scaling.sizes import Sizes

RATES = (10.0, 1_000.0, 100_000.0)
_GB = 1e9


@dataclass(frozen=True, slots=True)
class Site:
    """Everything beside network and rate."""

    pod: PodSize
    autoscaler: Settings
    prices: Prices = field(default_factory=Prices)
    bounds: Bounds = field(default_factory=Bounds)

    def pods_on(self, node: Node) -> int:
        by_cpu = (node.cpus - node.system_cpu) / self.pod.cpu
        by_memory = node.memory_gib * GIB / self.pod.memory
        return int(min(by_cpu, by_memory))

    def nodes(self, pods: int) -> tuple[Node, int]:
        """Nodes of the kind that costs least, two at least: the manifests spread pods over zones."""
        offers = [(node, max(2, math.ceil(pods / self.pods_on(node)))) for node in NODES if self.pods_on(node)]
        return min(offers, key=lambda offer: offer[1] * offer[0].price)


@dataclass(frozen=True, slots=True)
class Need:
    """Something that gives way: `share` is what is needed of what there is before anybody changes a setting."""

    what: str
    needed: float
    there: float
    unit: str
    remedy: str

    @property
    def share(self) -> float:
        return self.needed / self.there


@dataclass(frozen=True, slots=True)
class Plan:
    """What a steady rate takes. Dollars are a month's: `fixed` is what stands whatever the rate, `compute` inference's
    own nodes, `puts` what storing every image would add."""

    network: str
    rate: float
    cores: float
    pods: int
    node: Node
    nodes: int
    fixed: float
    compute: float
    balancer: float
    records: float
    puts: float
    needs: Sequence[Need]

    @property
    def total(self) -> float:
        """Without stored images."""
        return self.fixed + self.compute + self.balancer + self.records

    @property
    def first(self) -> Need:
        """What gives way first."""
        return max(self.needs, key=lambda need: need.share)


def plan(network: Network, rate: float, sizes: Sizes, site: Site) -> Plan:
    """What `rate` predictions a second take, as steady load: the pods that the autoscaler would settle at by CPU."""
    prices, bounds = site.prices, site.bounds
    cores = rate * network.together
    pods = pods_for(network, rate, site)
    node, nodes = site.nodes(pods)
    stored_gb = rate * sizes.document * bounds.retention_days * 86_400 / _GB
    sets = max(math.ceil(rate / bounds.records_a_second), math.ceil(stored_gb / bounds.volume_gb))
    return Plan(
        network=network.name,
        rate=rate,
        cores=cores,
        pods=pods,
        node=node,
        nodes=nodes,
        fixed=prices.fixed * HOURS_A_MONTH,
        compute=nodes * node.price * HOURS_A_MONTH,
        balancer=balancer_units(rate, sizes, bounds) * prices.balancer_unit * HOURS_A_MONTH,
        records=3 * (sets * prices.records_server * HOURS_A_MONTH + stored_gb * prices.disk_gb),
        puts=rate * SECONDS_A_MONTH * prices.put,
        needs=_needs(rate, sizes, site, pods, node.bits * nodes, stored_gb),
    )


def pods_for(network: Network, rate: float, site: Site) -> int:
    """How many pods keep CPU at the autoscaler's target, and at least its minimum."""
    target = next((metric.target for metric in site.autoscaler.metrics if metric.kind == "cpu"), 1.0)
    each = min(target * site.pod.cpu, 1.0 if network.at_once(site.pod.cpu) == 1 else site.pod.cpu)
    return max(site.autoscaler.minimum, math.ceil(round(rate * network.together / each, 9)))


def balancer_units(rate: float, sizes: Sizes, bounds: Bounds) -> float:
    """LCUs: the largest of the dimensions counts; connections that are open at once never come near here."""
    gb_an_hour = rate * sizes.on_the_wire * 3600 / _GB
    connections = rate / bounds.requests_a_connection
    return max(gb_an_hour / bounds.unit_gb_an_hour, connections / bounds.unit_connections)


def _needs(rate: float, sizes: Sizes, site: Site, pods: int, bits: float, stored_gb: float) -> list[Need]:
    bounds = site.bounds
    poll_s = float(ServingSettings.model_fields["poll_seconds"].default)
    spool = float(RecordingSettings.model_fields["spool_max_bytes"].default)
    moved = rate * (sizes.on_the_wire + sizes.document) * 8
    spooled = rate / pods * sizes.spooled * bounds.outage_s
    return [
        Need("pods of the autoscaler", pods, site.autoscaler.maximum, "", "raise maxReplicas"),
        Need("inserts of records", rate, bounds.records_a_second, "/s", "shard MongoDB by id"),
        Need("disk of records", stored_gb, bounds.volume_gb, "GB", "keep them for fewer days, or shard"),
        Need("polls of MLflow", pods / poll_s, bounds.tracking_reads, "/s", "raise MEDLOOP_POLL_SECONDS"),
        Need("targets of the balancer", pods, bounds.targets, "", "larger pods, or several balancers"),
        Need("network of the nodes", moved / 1e9, bits / 1e9, "Gbit/s", "more nodes"),
        Need("spool of a pod", spooled / 2**20, spool / 2**20, "MiB", "raise MEDLOOP_SPOOL_MAX_BYTES"),
    ]


def storing(rate: float, pods: int, bounds: Bounds) -> list[Need]:
    """What gives way beside that where every image is stored; a pod stores one after the other."""
    return [
        Need("images one pod stores", rate / pods, 1 / bounds.put_s, "/s", "store fewer, or have more pods"),
        Need("PUTs to S3", rate, bounds.puts_a_second, "/s", "S3 divides prefixes by itself, over minutes"),
    ]
