"""Which addresses a policy may name: everything but what is private, by HTTPS, or something private."""

from typing import Any

import pytest

from k8s.check.arrows import Arrow, faults

PRIVATE = ["10.0.0.0/8", "100.64.0.0/10", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16"]
NAME = "app.kubernetes.io/name"
ALL_DENIED = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
DNS = {
    "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
    "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
}


def told(port: int, cidr: str, *left_out: str) -> list[str]:
    """What is said of a Pod that may reach these addresses by this port, where the design has HTTPS to objects."""
    block = {"cidr": cidr, "except": list(left_out)}
    template = {"metadata": {"labels": {NAME: "inference"}}, "spec": {"containers": []}}
    documents: list[dict[str, Any]] = [
        {"kind": "Deployment", "metadata": {"name": "inference"}, "spec": {"template": template}},
        {"kind": "NetworkPolicy", "metadata": {"name": "default-deny"}, "spec": ALL_DENIED},
        policy("to-dns", DNS, 53),
        policy("to-objects", {"ipBlock": block}, port),
    ]
    return list(faults(documents, {Arrow("inference", "objects", 443)}))


def policy(name: str, peer: dict[str, Any], port: int) -> dict[str, Any]:
    rule = {"to": [peer], "ports": [{"port": port}]}
    spec = {"podSelector": {}, "policyTypes": ["Egress"], "egress": [rule]}
    return {"kind": "NetworkPolicy", "metadata": {"name": name}, "spec": spec}


@pytest.mark.parametrize(
    "addresses",
    [
        ["0.0.0.0/0", *PRIVATE],
        ["0.0.0.0/0", "192.0.2.0/24", *PRIVATE],
        ["128.0.0.0/2", *PRIVATE[2:4]],
        ["172.0.0.0/8", "172.0.0.0/11"],
        ["198.51.100.0/24"],
        ["2000::/3"],
        ["::/0", "fc00::/7", "fe80::/10"],
        ["192.168.0.0/20"],
        ["fd00::/8"],
    ],
)
def test_https_to_what_is_public_or_to_something_private(addresses: list[str]) -> None:
    assert told(443, *addresses) == []


@pytest.mark.parametrize(
    ("port", "addresses"),
    [
        (443, ["0.0.0.0/0"]),
        (443, ["0.0.0.0/0", *PRIVATE[1:]]),
        (443, ["0.0.0.0/0", "192.0.2.0/24"]),
        (443, ["0.0.0.0/0", "192.0.2.0/24", *PRIVATE[1:]]),
        (443, ["0.0.0.0/0", "10.0.0.0/9", *PRIVATE[1:]]),
        (443, ["0.0.0.0/1"]),
        (443, ["172.0.0.0/8", "172.16.0.0/13"]),
        (443, ["::/0"]),
        (443, ["::/0", *PRIVATE]),
        (22, ["0.0.0.0/0", *PRIVATE]),
        (22, ["0.0.0.0/1", *PRIVATE[:2]]),
        (22, ["198.51.100.7/32"]),
        (22, ["::/0", "fc00::/7", "fe80::/10"]),
    ],
)
def test_nothing_else(port: int, addresses: list[str]) -> None:
    said = f"NetworkPolicy to-objects: {addresses[0]} is allowed on port 443 and without private addresses only"
    assert said in told(port, *addresses)


def test_something_private_by_a_port_that_the_design_has_not() -> None:
    assert told(22, "10.0.0.0/8")[0].startswith("the arrow inference → objects, port 22, may leave, which the design")
