"""That what is named exists: settings, Secrets, ConfigMaps, ports, budgets, metrics."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from medloop.settings import DEFAULT_PORTS

from k8s.check.pods import NAME, Pods, templates
from k8s.check.render import ROOT, Document

FOREIGN = {
    "MLFLOW_TRACKING_URI": "MLflow's own, and in .env.example",
    "MLFLOW_BACKEND_STORE_URI": "MLflow's server",
    "MLFLOW_DEFAULT_ARTIFACT_ROOT": "MLflow's server",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "MLflow's, false in every process of ours",
    "MLFLOW_DISABLE_TELEMETRY": "MLflow's",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "MLflow's server",
    "PGDATA": "PostgreSQL's image",
    "HOME": "MongoDB's shell",
    "LAUNCHER": "k8s/base/trainer/train.sh",
    "RETRAINING_QUEUE": "k8s/components/event-retraining/take_messages.py",
    **dict.fromkeys(("PET_RDZV_ID",), "torchrun"),
}
"""Variables that are not settings of ours, and whose they are."""
ISSUED = {
    "batch-key": "an API key, issued once records run",
    "evaluate-key": "an API key, issued once records run; of eks, an ExternalSecret",
    "metrics-key": "an API key, issued once records run",
}
"""Secrets that nobody can write down before the services run; who needs them waits until they are there."""
CLUSTER_WIDE = {"Namespace", "GatewayClass"}
_SETTING = re.compile(r"^#? ?([A-Z][A-Z0-9_]+)=", re.MULTILINE)
_METRIC = re.compile(r"\bmedloop_[a-z_]+\b")
_SUFFIXES = ("_bucket", "_count", "_sum")


def known_settings() -> set[str]:
    return set(_SETTING.findall((ROOT / ".env.example").read_text())) | set(FOREIGN)


def known_metrics() -> set[str]:
    return set(_METRIC.findall((ROOT / "docs" / "metrics.md").read_text()))


def faults(documents: Iterable[Document]) -> Iterator[str]:
    found = list(documents)
    pods = list(templates(found))
    yield from _settings(found, pods)
    yield from _named(found, pods)
    yield from _ports(found)
    yield from _disruption(found, pods)
    yield from _metrics(found)
    yield from _namespaces(found)


def _settings(documents: list[Document], pods: list[Pods]) -> Iterator[str]:
    known, unknown = known_settings(), "nobody reads {} (.env.example, k8s/check/references.py)"
    for document in documents:
        if document["kind"] == "ConfigMap" and document["metadata"]["name"].startswith("medloop-"):
            for name in sorted(document.get("data", {}).keys() - known):
                yield f"ConfigMap {document['metadata']['name']}: {unknown.format(name)}"
    for each in pods:
        for container in each.containers:
            for name in sorted({variable["name"] for variable in container.get("env", [])} - known):
                yield f"{each.where}: {unknown.format(name)}"


def _named(documents: list[Document], pods: list[Pods]) -> Iterator[str]:
    there = {kind: {d["metadata"]["name"] for d in documents if d["kind"] == kind} for kind in _KINDS}
    there["Secret"] |= set(ISSUED)
    there["Secret"] |= {d["spec"]["target"]["name"] for d in documents if d["kind"] == "ExternalSecret"}
    wanted: list[tuple[str, str, str]] = [(each.where, kind, name) for each in pods for kind, name in _of_pods(each)]
    wanted += [(f"{d['kind']} {d['metadata']['name']}", "Secret", name) for d in documents for name in _of_custom(d)]
    for where, kind, name in wanted:
        if name not in there[kind]:
            yield f"{where}: there is no {kind} {name}"


_KINDS = ("Secret", "ConfigMap", "ServiceAccount", "PersistentVolumeClaim")


def _of_pods(pods: Pods) -> Iterator[tuple[str, str]]:
    yield "ServiceAccount", pods.spec.get("serviceAccountName", "")
    for volume in pods.spec.get("volumes", []):
        for source, kind, key in (
            ("secret", "Secret", "secretName"),
            ("configMap", "ConfigMap", "name"),
            ("persistentVolumeClaim", "PersistentVolumeClaim", "claimName"),
        ):
            if source in volume:
                yield kind, volume[source][key]
    for container in pods.containers:
        sources = [*container.get("envFrom", []), *(e.get("valueFrom", {}) for e in container.get("env", []))]
        for source in sources:
            for reference, kind in (("secret", "Secret"), ("configMap", "ConfigMap")):
                for key in (f"{reference}Ref", f"{reference}KeyRef"):
                    if key in source:
                        yield kind, source[key]["name"]


def _of_custom(document: Document) -> Iterator[str]:
    spec = document.get("spec", {})
    if document["kind"] == "ListenerRuleConfiguration":
        for action in spec["actions"]:
            if "authenticateOIDCConfig" in action:
                yield action["authenticateOIDCConfig"]["secret"]["name"]
    if document["kind"] == "ServiceMonitor":
        for endpoint in spec["endpoints"]:
            yield endpoint["authorization"]["credentials"]["name"]


def _ports(documents: list[Document]) -> Iterator[str]:
    services = {d["metadata"]["name"]: d for d in documents if d["kind"] == "Service"}
    for name, service in services.items():
        ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
        if name in DEFAULT_PORTS and ports.get("http") != DEFAULT_PORTS[name]:
            yield f"Service {name}: its port is {ports.get('http')}, where {name} has {DEFAULT_PORTS[name]}"
    for route in (d for d in documents if d["kind"] == "HTTPRoute"):
        where = f"HTTPRoute {route['metadata']['name']}"
        for backend in (b for rule in route["spec"]["rules"] for b in rule.get("backendRefs", [])):
            if backend["name"] not in services or backend["port"] != DEFAULT_PORTS.get(backend["name"]):
                yield f"{where}: there is no {backend['name']} with port {backend['port']}"


def _disruption(documents: list[Document], pods: list[Pods]) -> Iterator[str]:
    budgets = {d["spec"]["selector"]["matchLabels"].get(NAME) for d in documents if d["kind"] == "PodDisruptionBudget"}
    scaled = {d["spec"]["scaleTargetRef"]["name"] for d in documents if d["kind"] == "HorizontalPodAutoscaler"}
    by_name = {each.where: each for each in pods}
    for document in (d for d in documents if d["kind"] == "Deployment"):
        name, where = document["metadata"]["name"], f"Deployment {document['metadata']['name']}"
        if name in scaled and "replicas" in document["spec"]:
            yield f"{where}: its replicas would undo what the autoscaler chose, at every apply"
        if name not in scaled and document["spec"].get("replicas", 1) < 2:
            continue
        if name not in budgets:
            yield f"{where}: all its Pods may be taken away at once (PodDisruptionBudget)"
        spread = {each["topologyKey"] for each in by_name[where].spec.get("topologySpreadConstraints", [])}
        if not {"topology.kubernetes.io/zone", "kubernetes.io/hostname"} <= spread:
            yield f"{where}: all its Pods may be on one node (topologySpreadConstraints)"


def _metrics(documents: list[Document]) -> Iterator[str]:
    known = known_metrics()
    for document in documents:
        for where, text in _expressions(document):
            for name in sorted(set(_METRIC.findall(text))):
                plain = next((name.removesuffix(end) for end in _SUFFIXES if name.endswith(end)), name)
                if not {name, plain} & known:
                    yield f"{where}: nobody tells {name} (docs/metrics.md)"


def _expressions(document: Document) -> Iterator[tuple[str, str]]:
    name, spec = document["metadata"]["name"], document.get("spec", {})
    if document["kind"] == "HorizontalPodAutoscaler":
        sources = {metric["type"] for metric in spec["metrics"]}
        yield (
            f"HorizontalPodAutoscaler {name}",
            " ".join(metric["pods"]["metric"]["name"] for metric in spec["metrics"] if metric["type"] == "Pods")
            if "Resource" in sources
            else "medloop_no_processor_metric_to_fall_back_on",
        )
    if document["kind"] == "PrometheusRule":
        for rule in _rules(spec):
            yield f"PrometheusRule {name}, {rule.get('alert', rule.get('record'))}", rule["expr"]


def _rules(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [rule for group in spec["groups"] for rule in group["rules"]]


def _namespaces(documents: list[Document]) -> Iterator[str]:
    spaces = {d["metadata"]["name"]: d for d in documents if d["kind"] == "Namespace"}
    for document in documents:
        name, kind = document["metadata"]["name"], document["kind"]
        space = document["metadata"].get("namespace")
        if kind not in CLUSTER_WIDE and space not in spaces:
            yield f"{kind} {name}: is in namespace {space}, which is not ours"
        if kind == "ServiceAccount" and document.get("automountServiceAccountToken") is not False:
            yield f"ServiceAccount {name}: its token is mounted by itself (automountServiceAccountToken: false)"
        if kind == "PrometheusRule":
            for rule in _rules(document["spec"]):
                if "alert" in rule and not rule.get("annotations", {}).get("runbook"):
                    yield f"PrometheusRule {name}, {rule['alert']}: says nobody what to do (annotations.runbook)"
    for name, space in spaces.items():
        levels = [space["metadata"]["labels"].get(f"pod-security.kubernetes.io/{mode}") for mode in ("enforce", "warn")]
        if levels != ["restricted", "restricted"]:
            yield f"Namespace {name}: takes Pods that are not restricted (pod-security.kubernetes.io/enforce)"
