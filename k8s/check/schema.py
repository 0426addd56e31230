"""Every document against Kubernetes' own schema, strictly: an unknown field is a fault, not a wish."""

import json
from collections.abc import Iterator
from functools import lru_cache

import kubernetes_validate  # type: ignore[import-untyped]  # ships no types

from k8s.check.render import Document

VERSION = "1.33"
"""The oldest release that the manifests are for: limits of failures by index (Job) are stable in it."""

CUSTOM = {
    "gateway.networking.k8s.io/v1": {"GatewayClass", "Gateway", "HTTPRoute"},
    "gateway.k8s.aws/v1beta1": {"LoadBalancerConfiguration", "ListenerRuleConfiguration", "TargetGroupConfiguration"},
    "external-secrets.io/v1": {"SecretStore", "ExternalSecret"},
    "monitoring.coreos.com/v1": {"ServiceMonitor", "PrometheusRule"},
    "keda.sh/v1alpha1": {"ScaledJob", "TriggerAuthentication"},
    "trainer.kubeflow.org/v1alpha1": {"TrainJob", "TrainingRuntime"},
}
"""Kinds whose schemas come with what a cluster has installed: only our own assertions look at them. No other may be."""


def faults(document: Document) -> Iterator[str]:
    if document["kind"] not in CUSTOM.get(document["apiVersion"], ()):
        yield from _faults(json.dumps(document, sort_keys=True))
    if document["kind"] == "ScaledJob":
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": document["metadata"]}
        yield from _faults(json.dumps(job | {"spec": document["spec"]["jobTargetRef"]}, sort_keys=True))


@lru_cache(maxsize=1024)
def _faults(text: str) -> tuple[str, ...]:
    """Remembered: most documents are the same wherever they are rendered."""
    document = json.loads(text)
    name = f"{document['kind']} {document['metadata']['name']}"
    try:
        kubernetes_validate.validate(document, VERSION, strict=True)
    except kubernetes_validate.ValidationError as exc:
        return (f"{name}: {exc.message} (at {'.'.join(str(step) for step in exc.path) or 'the top'})",)
    except kubernetes_validate.SchemaNotFoundError:
        return (f"{name}: neither Kubernetes {VERSION} nor k8s/check/schema.py knows it in {document['apiVersion']}",)
    return ()
