"""The files for eksctl and kubectl: what the cluster has, and that the deployer has the rights it needs, no more."""

import shutil
import subprocess
from pathlib import Path
from string import Template
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # ships no types

ROOT = Path(__file__).parents[3]
EKS = ROOT / "infra" / "aws" / "eks"
# kubectl finds the plural of a kind out from the cluster; here the rule is simple.
PLURAL = {"NetworkPolicy": "networkpolicies", "GatewayClass": "gatewayclasses"}


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    values = {"AWS_REGION": "eu-central-1", "MEDLOOP_KEY_ARN": "arn:key", "MEDLOOP_ADMIN_CIDR": "192.0.2.0/24"}
    read = yaml.safe_load(Template((EKS / "cluster.yaml").read_text()).substitute(values))
    assert isinstance(read, dict)
    return read


@pytest.fixture(scope="module")
def rules() -> list[dict[str, Any]]:
    return [
        rule
        for document in yaml.safe_load_all((EKS / "deployer.yaml").read_text())
        if document["kind"] in ("Role", "ClusterRole")
        for rule in document["rules"]
    ]


@pytest.fixture(scope="module")
def overlay() -> list[dict[str, Any]]:
    """The objects of the overlay eks."""
    if shutil.which("kubectl") is None:
        pytest.skip("rendering the overlay needs kubectl")
    command = ["kubectl", "kustomize", str(ROOT / "k8s" / "overlays" / "eks")]
    rendered = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return list(yaml.safe_load_all(rendered))


def test_the_cluster_is_encrypted_logged_and_reached_from_where_was_said(cluster: dict[str, Any]) -> None:
    assert cluster["secretsEncryption"] == {"keyARN": "arn:key"}
    assert set(cluster["cloudWatch"]["clusterLogging"]["enableTypes"]) >= {"api", "audit", "authenticator"}
    assert cluster["vpc"]["clusterEndpoints"]["privateAccess"] is True
    assert cluster["vpc"]["publicAccessCIDRs"] == ["192.0.2.0/24"]
    assert cluster["accessConfig"] == {"authenticationMode": "API"}
    addons = {addon["name"]: addon for addon in cluster["addons"]}
    assert {"eks-pod-identity-agent", "vpc-cni", "metrics-server"} <= addons.keys()
    assert yaml.safe_load(addons["vpc-cni"]["configurationValues"]) == {"enableNetworkPolicy": "true"}
    for group in cluster["managedNodeGroups"]:
        assert (group["privateNetworking"], group["volumeEncrypted"], group["disablePodIMDS"]) == (True, True, True)


def test_the_deployer_reads_no_secret_opens_no_shell_and_gives_no_rights(rules: list[dict[str, Any]]) -> None:
    for rule in rules:
        assert not {"*", "secrets", "pods/exec", "pods/attach", "nodes", "serviceaccounts/token"} & set(
            rule["resources"]
        )
        assert not {"*", "delete", "deletecollection", "bind", "escalate", "impersonate"} & set(rule["verbs"])
        assert "rbac.authorization.k8s.io" not in rule["apiGroups"]
        if "resourceNames" in rule:
            assert rule["verbs"] == ["get"]


def test_the_deployer_may_apply_each_kind_of_the_overlay_and_no_other(
    rules: list[dict[str, Any]], overlay: list[dict[str, Any]]
) -> None:
    kinds = {
        (document["apiVersion"].rpartition("/")[0].partition("/")[0], resource_of(document["kind"]))
        for document in overlay
    }
    applied = {
        (group, resource)
        for rule in rules
        if "resourceNames" in rule or "patch" in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert kinds == applied


def resource_of(kind: str) -> str:
    return PLURAL.get(kind, f"{kind.lower()}s")
