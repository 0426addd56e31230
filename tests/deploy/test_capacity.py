"""That the cluster file has nodes for all that the manifests may ask for at once."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml  # type: ignore[import-untyped]  # ships no types

from benchmarks.scaling.assumptions import NODES
from k8s.check.render import CannotCheck, Document, copied, documents, find_kubectl, kustomize

CLUSTER = Path(__file__).resolve().parents[2] / "infra" / "aws" / "eks" / "cluster.yaml"
LARGE = next(node for node in NODES if node.name == "m7a.large")


class Size(NamedTuple):
    cpu: int
    """In thousandths."""
    memory: int
    """In MiB."""


@pytest.fixture(scope="module")
def eks() -> list[Document]:
    try:
        kubectl = find_kubectl()
    except CannotCheck as exc:
        pytest.skip(str(exc))
    with copied() as folder:
        return documents(kustomize(kubectl, folder / "overlays" / "eks"))


def asked_at_most(found: list[Document]) -> Iterator[Size]:
    """Each Pod there may be at a time: autoscaled ones at their most, and those of a roll-out of everything."""
    scaled = {
        d["spec"]["scaleTargetRef"]["name"]: int(d["spec"]["maxReplicas"])
        for d in found
        if d["kind"] == "HorizontalPodAutoscaler"
    }
    for document in found:
        spec = document.get("spec", {})
        if document["kind"] == "Deployment":
            replicas = scaled.get(document["metadata"]["name"], spec.get("replicas", 1))
            yield from [size(spec["template"]["spec"])] * (replicas + surge(spec.get("strategy", {}), replicas))
        elif document["kind"] == "CronJob":
            job = spec["jobTemplate"]["spec"]
            yield from [size(job["template"]["spec"])] * job.get("parallelism", 1)


def surge(strategy: dict[str, Any], replicas: int) -> int:
    if strategy.get("type") == "Recreate":
        return 0
    more = strategy.get("rollingUpdate", {}).get("maxSurge", "25%")
    return more if isinstance(more, int) else math.ceil(replicas * int(more.removesuffix("%")) / 100)


def size(pod: dict[str, Any]) -> Size:
    asked = [each["resources"]["requests"] for each in pod["containers"]]
    units = {"Mi": 1, "Gi": 1024}
    cpus = (str(each["cpu"]) for each in asked)
    return Size(
        sum(int(cpu.removesuffix("m")) * (1 if cpu.endswith("m") else 1000) for cpu in cpus),
        sum(int(each["memory"][:-2]) * units[each["memory"][-2:]] for each in asked),
    )


def nodes_for(pods: list[Size], node: Size) -> int:
    """By first fit, the largest first: what the scheduler does at worst comes close."""
    free: list[Size] = []
    for pod in sorted(pods, reverse=True):
        assert pod.cpu <= node.cpu
        assert pod.memory <= node.memory
        index = next((i for i, each in enumerate(free) if pod.cpu <= each.cpu and pod.memory <= each.memory), len(free))
        if index == len(free):
            free.append(node)
        free[index] = Size(free[index].cpu - pod.cpu, free[index].memory - pod.memory)
    return len(free)


def test_the_nodes_are_enough_for_the_autoscaler_s_most_and_one_more(eks: list[Document]) -> None:
    groups = {group["name"]: group for group in yaml.safe_load(CLUSTER.read_text())["managedNodeGroups"]}
    services = groups["services"]
    assert {kind.partition(".")[2] for kind in services["instanceTypes"]} == {"large"}
    assert LARGE.name in services["instanceTypes"]
    node = Size(round(1000 * (LARGE.cpus - LARGE.system_cpu)), int(1024 * LARGE.memory_gib))
    pods = list(asked_at_most(eks))
    inference = next(d["spec"]["maxReplicas"] for d in eks if d["kind"] == "HorizontalPodAutoscaler")
    assert len(pods) > inference
    assert nodes_for(pods, node) + services["updateConfig"]["maxUnavailable"] <= services["maxSize"]
