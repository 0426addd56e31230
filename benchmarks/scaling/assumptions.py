"""What was not measured here: prices, bounds of other people's services, and times of a cluster. Check them.

Prices are Amazon's list prices in US dollars for us-east-1 on demand, as they were known in 2025; there was no way to
look them up while this was written. Every one of them is a parameter of `Prices`.
"""

from dataclasses import dataclass

HOURS_A_MONTH = 730.0
SECONDS_A_MONTH = HOURS_A_MONTH * 3600
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Node:
    """A kind of machine that holds pods of inference: Zen 4, as the measured machine, with a whole core for each vCPU.

    `system_cpu` is what kubelet, network plug-in and agents take of it, `memory_gib` what pods have, `bits` a second
    what its network guarantees (less than it is sold with, "up to"), `price` dollars an hour.
    """

    name: str
    cpus: float
    system_cpu: float
    memory_gib: float
    bits: float
    price: float


NODES = (
    Node("m7a.large", 2.0, 0.4, 6.5, 0.78e9, 0.11592),  # of the kinds that infra/aws/eks/cluster.yaml takes
    Node("c7a.4xlarge", 16.0, 0.8, 28.0, 6.25e9, 0.82112),
)


@dataclass(frozen=True, slots=True)
class Prices:
    """US dollars. `services` are the three nodes of infra/aws/eks/cluster.yaml, on which everything but inference runs;
    of the records' servers a replica set has three."""

    cluster: float = 0.10  # EKS control plane, an hour
    services: float = 3 * 0.11592  # m7a.large, an hour
    way_out: float = 0.045  # NAT gateway, an hour
    database: float = 0.032 + 20 * 0.115 / HOURS_A_MONTH  # db.t4g.small with 20 GB, an hour
    balancer: float = 0.0225  # ALB, an hour
    balancer_unit: float = 0.008  # LCU, an hour
    records_server: float = 0.3043  # r7a.xlarge, an hour
    disk_gb: float = 0.08  # gp3, a GB and month
    put: float = 0.005 / 1000  # S3, each

    @property
    def fixed(self) -> float:
        """An hour, whatever the rate."""
        return self.cluster + self.services + self.way_out + self.database + self.balancer


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one unit of each neighbour takes, as Amazon documents it unless it says assumed."""

    records_a_second: float = 5_000.0  # inserts of a replica set, majority and journal; assumed
    volume_gb: float = 16_384.0  # gp3; larger ones are offered since 2025
    tracking_reads: float = 100.0  # registered-models/get of one MLflow server a second; assumed
    puts_a_second: float = 3_500.0  # S3, a prefix
    put_s: float = 0.025  # one PUT from inside the region; assumed
    targets: float = 1_000.0  # of one ALB, its default quota
    unit_gb_an_hour: float = 1.0  # LCU
    unit_connections: float = 25.0  # new ones a second, LCU
    requests_a_connection: float = 100.0  # of clients that keep theirs open; assumed
    outage_s: float = 600.0  # that the spool should bridge while records are down; a choice
    retention_days: float = 30.0  # of records; a choice


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of a cluster; the pod's own start-up is measured. Autoscaling's are the defaults of Kubernetes."""

    sync: float = 15.0  # --horizontal-pod-autoscaler-sync-period
    tolerance: float = 0.1  # --horizontal-pod-autoscaler-tolerance
    young: float = 300.0  # --horizontal-pod-autoscaler-cpu-initialization-period
    resource_metrics: float = 15.0  # metrics-server's --metric-resolution
    custom_metrics: float = 5.0  # Prometheus' scrape interval
    custom_window: float = 30.0  # the largest of so many seconds counts
    schedule: float = 2.0  # from the changed scale to a container that runs, image present; assumed
    node: float = 60.0  # from a pod without room to a node that is ready; assumed
    pull: float = 20.0  # of the image onto a new node; assumed
    bundle: float = 2.0  # the model's download, since a new pod has an empty cache; assumed
    register: float = 10.0  # until the load balancer's checks have passed; assumed
