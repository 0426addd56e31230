"""Who may speak to whom: what the policies allow, beside what the design has.

An arrow counts only when both ends allow it: the caller's egress and the other's ingress. What is outside of the
namespace has one end; the policy says which by its name, `to-objects` or `from-load-balancer`.
"""

import re
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, NamedTuple, TypeAlias

from k8s.check.pods import NAME, templates
from k8s.check.render import Document

Network: TypeAlias = IPv4Network | IPv6Network

_V4 = ("10.0.0.0/8", "100.64.0.0/10", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16")
PRIVATE: list[Network] = [ip_network(each) for each in (*_V4, "fc00::/7", "fe80::/10")]
"""The addresses of a VPC or a cluster, and of a node's own services, among them the one that gives out its role."""
ANY_PORT = 0


class Arrow(NamedTuple):
    """`port` 0 is every one."""

    caller: str
    callee: str
    port: int


def _arrows(callers: Iterable[str], callee: str, port: int) -> set[Arrow]:
    return {Arrow(caller, callee, port) for caller in callers}


_STORING = ("evaluator", "explainer", "inference")
_WORKING = (*_STORING, "dashboard", "trainer")

BASE = {
    *_arrows(["dashboard"], "inference", 8080),
    *_arrows(["dashboard", "evaluate"], "evaluator", 5006),
    *_arrows(["dashboard"], "explainer", 5005),
    *_arrows([*_WORKING, "evaluate"], "mlflow", 5000),
    *_arrows([*_WORKING, "mlflow"], "objects", 443),
}
"""The design's picture: the dashboard asks the services, and a CronJob the evaluator; all but they and the trainer keep
records; files are objects."""
OVERLAYS = {
    "dev": {*_arrows(_STORING, "mongodb", 27017), *_arrows(["mlflow"], "postgres", 5432)},
    "eks": {
        *_arrows(_STORING, "records", 27017),
        *_arrows(["mlflow"], "database", 5432),
        *_arrows([*_WORKING, "mlflow"], "pod-identity", 80),
        *_arrows(["load-balancer"], "dashboard", 8501),
        *_arrows(["dashboard"], "load-balancer-keys", 443),
        *_arrows(["load-balancer"], "inference", 8080),
    },
}
_TRAINERS = {Arrow("trainer", "trainer", ANY_PORT)}
_BUILDING = {Arrow("dataset", "objects", 443), Arrow("dataset", "pod-identity", 80)}
_MONITORED = {
    Arrow("prometheus", name, port) for name, port in (("inference", 8080), ("evaluator", 5006), ("explainer", 5005))
}
COMPONENTS: dict[str, dict[str, set[Arrow]]] = {
    "batch-scoring": dict.fromkeys(OVERLAYS, _arrows(["batch"], "inference", 8080)),
    "dataset": dict.fromkeys(OVERLAYS, _BUILDING),
    "distributed-training": dict.fromkeys(OVERLAYS, _TRAINERS),
    "kubeflow-training": dict.fromkeys(OVERLAYS, _TRAINERS),
    "monitoring": dict.fromkeys(OVERLAYS, _MONITORED),
    "search": {"dev": _arrows(["trainer"], "postgres", 5432), "eks": _arrows(["trainer"], "database", 5432)},
}
"""What components add, by overlay."""


def designed(overlay: str, components: Iterable[str] = ()) -> set[Arrow]:
    """The arrows that an overlay with these components is to have, but for the one to names (DNS) that all have."""
    return BASE.union(OVERLAYS[overlay], *(COMPONENTS.get(name, {}).get(overlay, set()) for name in components))


def faults(documents: Iterable[Document], wanted: set[Arrow]) -> Iterator[str]:
    found = list(documents)
    policies = [d for d in found if d["kind"] == "NetworkPolicy"]
    if not any(_denies_all(policy) for policy in policies):
        yield "no policy denies everything first (podSelector: {}, both policyTypes, no rules)"
    labels = [pods.labels for pods in templates(found) if pods.component]
    out, into = set[Arrow](), set[Arrow]()
    for policy in policies:
        try:
            out |= set(_drawn(policy, labels, "egress"))
            into |= set(_drawn(policy, labels, "ingress"))
        except ValueError as exc:
            yield f"NetworkPolicy {policy['metadata']['name']}: {exc}"
    inside = {each[NAME] for each in labels}
    wanted = {arrow for arrow in wanted if {arrow.caller, arrow.callee} & inside}
    yield from _compare(out, {a for a in wanted if a.caller in inside}, "may leave", "cannot leave")
    yield from _compare(into, {a for a in wanted if a.callee in inside}, "is let in", "is not let in")
    for component in sorted(inside - {a.caller for a in out if a.callee == "dns"}):
        yield f"{component} cannot ask for names (DNS)"


def _compare(drawn: set[Arrow], wanted: set[Arrow], too_much: str, missing: str) -> Iterator[str]:
    drawn = {arrow for arrow in drawn if arrow.callee != "dns"}
    for verb, arrows, why in (
        (too_much, drawn - wanted, "which the design does not have (k8s/check/arrows.py)"),
        (missing, wanted - drawn, "as the design has it (k8s/check/arrows.py)"),
    ):
        for caller, callee, port in sorted(arrows):
            yield f"the arrow {caller} → {callee}, port {port or 'any'}, {verb}, {why}"


def _denies_all(policy: Document) -> bool:
    spec = policy["spec"]
    both = {"Ingress", "Egress"} <= set(spec.get("policyTypes", []))
    return both and not spec["podSelector"] and not spec.get("ingress") and not spec.get("egress")


def _drawn(policy: Document, pods: list[dict[str, str]], direction: str) -> Iterator[Arrow]:
    """The arrows of one policy in one direction; raises ValueError for a rule that nobody can draw."""
    spec, name = policy["spec"], policy["metadata"]["name"]
    if direction.capitalize() not in spec.get("policyTypes", []):
        return
    selected = {labels[NAME] for labels in pods if _selects(spec["podSelector"], labels)}
    for rule in spec.get(direction, []):
        peers = rule.get("to" if direction == "egress" else "from")
        if not peers:
            raise ValueError(f"an {direction} rule without peers is for everybody")
        others = {other for peer in peers for other in _named(peer, name, pods, direction, rule)}
        for port in _ports(rule):
            for one in selected:
                yield from (Arrow(one, o, port) if direction == "egress" else Arrow(o, one, port) for o in others)


def _ports(rule: dict[str, Any]) -> list[int]:
    if any("endPort" in port or not isinstance(port.get("port"), int) for port in rule.get("ports", [])):
        raise ValueError("a rule for a range of ports, or for a port by its name, is not checked: give numbers")
    return [port["port"] for port in rule.get("ports", [])] or [ANY_PORT]


def _named(
    peer: dict[str, Any], policy: str, pods: list[dict[str, str]], direction: str, rule: dict[str, Any]
) -> set[str]:
    if (block := peer.get("ipBlock")) is not None:
        prefix = "to-" if direction == "egress" else "from-"
        if not policy.startswith(prefix):
            raise ValueError(f"addresses belong into a policy whose name says what they are: {prefix}…")
        _check_addresses(block, _ports(rule))
        return {re.split("-to-|-for-", policy.removeprefix(prefix))[0]}
    if (namespace := peer.get("namespaceSelector")) is not None:
        names = {"kube-system": "dns", "monitoring": "prometheus"}
        found = names.get(namespace.get("matchLabels", {}).get("kubernetes.io/metadata.name", ""))
        if found is None or not peer.get("podSelector"):
            raise ValueError("a rule for a whole namespace, or for an unknown one")
        return {found}
    selected = {labels[NAME] for labels in pods if _selects(peer["podSelector"], labels)}
    if not peer["podSelector"]:
        raise ValueError("a rule for every Pod of the namespace")
    return selected


def _check_addresses(block: dict[str, Any], ports: list[int]) -> None:
    """Raise ValueError for addresses that are not all private, unless none of them is and the port is 443."""
    network = ip_network(block["cidr"])
    left_out = [ip_network(each) for each in block.get("except", [])]
    if any(_within(network, private) for private in PRIVATE):
        return
    inside = [private for private in PRIVATE if _within(private, network)]
    missing = [private for private in inside if not any(_within(private, each) for each in left_out)]
    if missing or ports != [443]:
        raise ValueError(f"{network} is allowed on port 443 and without private addresses only")


def _within(inner: Network, outer: Network) -> bool:
    """Of two networks one holds the other, or they have nothing in common."""
    return inner.version == outer.version and inner.network_address in outer and inner.prefixlen >= outer.prefixlen


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    matches = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    for expression in selector.get("matchExpressions", []):
        if expression["operator"] != "In":
            raise ValueError(f"the operator {expression['operator']} is not checked: use In")
        matches = matches and labels.get(expression["key"]) in expression["values"]
    return matches
