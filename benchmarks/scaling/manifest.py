"""The autoscaler's settings and the pod's size, read from the manifests that a cluster is given."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # ships no types

from benchmarks.scaling.assumptions import Times
from benchmarks.scaling.autoscaler import DOWN, UP, Metric, Policy, Rules, Settings

_K8S = Path(__file__).parents[2] / "k8s"
BASE = _K8S / "base" / "inference"
MONITORING = _K8S / "components" / "monitoring"
QUEUE_WAIT = "medloop_queue_wait_seconds"
_UNITS = {"m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


@dataclass(frozen=True, slots=True)
class PodSize:
    """What one pod of inference requests, and the processors it may use at most."""

    cpu: float
    memory: float  # bytes
    cpu_limit: float


def autoscaler(folder: Path = BASE, times: Times | None = None) -> Settings:
    """The HorizontalPodAutoscaler in `folder`; raises ValueError for one that cannot be simulated."""
    spec = _only(folder, "HorizontalPodAutoscaler")["spec"]
    behavior = spec.get("behavior", {})
    tolerance = (times or Times()).tolerance
    return Settings(
        minimum=spec.get("minReplicas", 1),
        maximum=spec["maxReplicas"],
        metrics=tuple(_metric(each) for each in spec["metrics"]),
        up=_rules(behavior.get("scaleUp", {}), UP, tolerance),
        down=_rules(behavior.get("scaleDown", {}), DOWN, tolerance),
    )


def pod_size(folder: Path = BASE) -> PodSize:
    """The containers of the Deployment in `folder`, together."""
    containers = _only(folder, "Deployment")["spec"]["template"]["spec"]["containers"]
    requests = [container["resources"]["requests"] for container in containers]
    limits = [container["resources"]["limits"] for container in containers]
    cpu = sum(quantity(each["cpu"]) for each in requests)
    return PodSize(
        cpu=cpu,
        memory=sum(quantity(each["memory"]) for each in requests),
        cpu_limit=sum(quantity(each["cpu"]) if "cpu" in each else float("inf") for each in limits),
    )


def scrape_s(folder: Path = MONITORING) -> float:
    """How often Prometheus reads a pod's figures, which may be as old when the autoscaler looks at them."""
    endpoints = _only(folder, "ServiceMonitor")["spec"]["endpoints"]
    return max(float(str(endpoint["interval"]).removesuffix("s")) for endpoint in endpoints)


def window_s(folder: Path = MONITORING) -> float:
    """Of how many seconds the largest figure counts, as Prometheus' adapter is told."""
    values = yaml.safe_load((folder / "prometheus-adapter.values.yaml").read_text())
    queries = [rule["metricsQuery"] for rule in values["rules"]["custom"] if QUEUE_WAIT in rule["seriesQuery"]]
    found = re.search(r"max_over_time\(.*\[([0-9]+)s\]\)", queries[0]) if queries else None
    if found is None:
        raise ValueError(f"The adapter does not give the largest {QUEUE_WAIT} of some seconds.")
    return float(found[1])


def quantity(text: str | float) -> float:
    """Kubernetes' "Quantity": 250m is a quarter, 1Gi is 2³⁰."""
    digits = str(text).rstrip("mkMGKi")
    return float(digits) * _UNITS[str(text).removeprefix(digits)]


def _metric(entry: Mapping[str, Any]) -> Metric:
    if entry["type"] == "Resource" and entry["resource"]["name"] == "cpu":
        return Metric("cpu", entry["resource"]["target"]["averageUtilization"] / 100)
    if entry["type"] == "ContainerResource" and entry["containerResource"]["name"] == "cpu":
        return Metric("cpu", entry["containerResource"]["target"]["averageUtilization"] / 100)
    if entry["type"] == "Pods" and entry["pods"]["metric"]["name"] == QUEUE_WAIT:
        return Metric("queue-wait", quantity(entry["pods"]["target"]["averageValue"]))
    raise ValueError(f"The autoscaler has a metric that the simulation does not know: {entry}.")


def _rules(given: Mapping[str, Any], default: Rules, tolerance: float) -> Rules:
    policies = tuple(Policy(each["type"], each["value"], each["periodSeconds"]) for each in given.get("policies", ()))
    return Rules(
        window=given.get("stabilizationWindowSeconds", default.window),
        policies=policies or default.policies,
        select=given.get("selectPolicy", default.select),
        tolerance=quantity(given.get("tolerance", tolerance)),
    )


def _only(folder: Path, kind: str) -> Mapping[str, Any]:
    """The one manifest of this kind in the folder's files; raises ValueError where there is none, or several."""
    found = [document for document in _documents(folder) if document.get("kind") == kind]
    if len(found) != 1:
        raise ValueError(f"{folder} has {len(found)} manifests of kind {kind}; exactly one is needed.")
    return found[0]


def _documents(folder: Path) -> Iterator[Mapping[str, Any]]:
    for file in sorted(folder.glob("*.yaml")):
        yield from (document for document in yaml.safe_load_all(file.read_text()) if document)
