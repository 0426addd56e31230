"""The files for eksctl and kubectl: what the cluster has, and that who works in it has the rights it needs, no more."""

from pathlib import Path
from string import Template
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # ships no types

from k8s.check.render import CannotCheck, copied, find_kubectl, kustomize
from k8s.check.schema import faults

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


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((EKS / name).read_text()))


@pytest.fixture(scope="module")
def rules() -> list[dict[str, Any]]:
    """The deployer's."""
    return [
        rule
        for document in documents("deployer.yaml")
        if document["kind"] in ("Role", "ClusterRole")
        for rule in document["rules"]
    ]


@pytest.fixture(scope="module")
def overlay() -> list[dict[str, Any]]:
    """The objects of the overlay eks with all components that a pipeline can apply: those without a Job."""
    try:
        kubectl = find_kubectl()
    except CannotCheck as exc:
        pytest.skip(str(exc))
    with copied() as root:
        mine = root / "overlays" / "mine"
        mine.mkdir()
        (mine / "kustomization.yaml").write_text(
            "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
            "resources: [../eks]\ncomponents: [../../components/monitoring, ../../components/event-retraining]\n"
        )
        return list(yaml.safe_load_all(kustomize(kubectl, mine)))


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


def test_the_deployer_asks_for_no_secret_has_no_way_into_a_pod_and_makes_only_config_maps(
    rules: list[dict[str, Any]],
) -> None:
    """Nothing here keeps it from a Secret that a Deployment mounts: it changes Deployments."""
    for rule in rules:
        resources, verbs = set(rule["resources"]), set(rule["verbs"])
        assert "*" not in resources
        assert not {"secrets", "nodes"} & resources
        assert not [resource for resource in resources if "/" in resource], "neither a shell, a port nor a token"
        assert verbs <= {"get", "list", "watch", "create", "patch"}
        assert "create" not in verbs or resources == {"configmaps"}
        assert "rbac.authorization.k8s.io" not in rule["apiGroups"]
        if "resourceNames" in rule:
            assert verbs == {"get"}


def test_the_deployer_sees_each_kind_of_the_overlay_and_changes_neither_accounts_nor_what_is_the_clusters(
    rules: list[dict[str, Any]], overlay: list[dict[str, Any]]
) -> None:
    kinds = {
        (document["apiVersion"].rpartition("/")[0].partition("/")[0], resource_of(document["kind"]))
        for document in overlay
    }
    seen, changed = (
        {
            (group, each)
            for rule in rules
            if verb in rule["verbs"]
            for group in rule["apiGroups"]
            for each in rule["resources"]
        }
        for verb in ("get", "patch")
    )
    assert kinds <= seen
    assert changed <= kinds
    assert kinds - changed == {
        ("", "namespaces"),
        ("", "serviceaccounts"),
        ("gateway.networking.k8s.io", "gatewayclasses"),
    }


def test_the_load_balancer_reads_the_secret_that_its_rule_names_and_no_other(
    overlay: list[dict[str, Any]], cluster: dict[str, Any]
) -> None:
    role, binding = documents("load-balancer.yaml")
    named = [
        action["authenticateOIDCConfig"]["secret"]["name"]
        for document in overlay
        if document["kind"] == "ListenerRuleConfiguration"
        for action in document["spec"]["actions"]
    ]
    (rule,) = role["rules"]
    assert (rule["apiGroups"], rule["resources"], rule["resourceNames"]) == ([""], ["secrets"], named)
    assert rule["verbs"] == ["get", "list", "watch"]
    assert {document["metadata"]["namespace"] for document in (role, binding)} == {"medloop"}
    (subject,) = binding["subjects"]
    accounts = {(each["namespace"], each["serviceAccountName"]) for each in cluster["iam"]["podIdentityAssociations"]}
    assert (subject["namespace"], subject["name"]) in accounts
    assert subject["name"] == "aws-load-balancer-controller"


def test_volumes_are_encrypted_by_the_driver_that_the_cluster_has(cluster: dict[str, Any]) -> None:
    [storage] = documents("storage-class.yaml")
    assert storage["parameters"]["encrypted"] == "true"
    assert storage["metadata"]["annotations"] == {"storageclass.kubernetes.io/is-default-class": "true"}
    assert storage["provisioner"] == "ebs.csi.aws.com"
    assert "aws-ebs-csi-driver" in {addon["name"] for addon in cluster["addons"]}
    job = (ROOT / "k8s" / "components" / "batch-scoring" / "job.yaml").read_text()
    claim = next(each for each in yaml.safe_load_all(job) if each["kind"] == "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"], "more than one node cannot have such a disk"


@pytest.mark.parametrize("name", ["deployer.yaml", "load-balancer.yaml", "storage-class.yaml"])
def test_what_a_person_applies_is_what_kubernetes_knows(name: str) -> None:
    found = documents(name)
    assert [fault for document in found for fault in faults(document)] == []
    roles = {document["metadata"]["name"] for document in found if "rules" in document}
    assert {document["roleRef"]["name"] for document in found if "roleRef" in document} == roles


def resource_of(kind: str) -> str:
    return PLURAL.get(kind, f"{kind.lower()}s")
