"""What every Pod must have: limits, a user, no way to more rights, probes, room to write, and time to end in."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from medloop.http.app import STOP_SECONDS
from medloop.settings import DEFAULT_PORTS

from k8s.check.render import Document

NAME = "app.kubernetes.io/name"
RESOURCES = ("cpu", "memory", "ephemeral-storage")
APIS = ("evaluator", "explainer", "inference")
"""The services that drain by themselves, and take STOP_SECONDS after that."""
HEALTH = {
    "mlflow": ("/health", "/health"),
    "dashboard": ("/_stcore/health", "/_stcore/health"),
    **dict.fromkeys(APIS, ("/livez", "/readyz")),
}
"""Where each answers as alive, and as ready."""
_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


@dataclass(frozen=True, slots=True)
class Pods:
    """What one workload makes Pods from. `component` is the label that Services and policies find them by."""

    where: str
    component: str
    labels: dict[str, str]
    spec: dict[str, Any]
    long_running: bool
    config: dict[str, str]
    """What the ConfigMaps hold that its containers take variables from."""

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    def variable(self, name: str) -> str | None:
        """What the first container that names it itself says, else the ConfigMaps."""
        for container in self.spec["containers"]:
            for variable in container.get("env", []):
                if variable["name"] == name:
                    return str(variable.get("value"))
        return self.config.get(name)


def templates(documents: Iterable[Document]) -> Iterator[Pods]:
    """The Pods of every workload."""
    found = list(documents)
    config = {d["metadata"]["name"]: d.get("data", {}) for d in found if d["kind"] == "ConfigMap"}
    for document in found:
        for template in _templates(document):
            spec, labels = template["spec"], template["metadata"]["labels"]
            merged: dict[str, str] = {}
            for container in spec["containers"]:
                for source in container.get("envFrom", []):
                    merged |= config.get(source.get("configMapRef", {}).get("name", ""), {})
            where = f"{document['kind']} {document['metadata']['name']}"
            long_running = document["kind"] in ("Deployment", "StatefulSet")
            yield Pods(where, labels.get(NAME, ""), labels, spec, long_running, merged)


def _templates(document: Document) -> list[dict[str, Any]]:
    spec = document.get("spec", {})
    match document["kind"]:
        case "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicaSet" | "Job":
            return [spec["template"]]
        case "CronJob":
            return [spec["jobTemplate"]["spec"]["template"]]
        case "ScaledJob":
            return [spec["jobTargetRef"]["template"]]
        case "TrainingRuntime":
            return [job["template"]["spec"]["template"] for job in spec["template"]["spec"]["replicatedJobs"]]
        case _:
            return []


def faults(documents: Iterable[Document]) -> Iterator[str]:
    for pods in templates(documents):
        for fault in _of_pod(pods):
            yield f"{pods.where}: {fault}"
        for container in pods.containers:
            for fault in _of_container(pods, container):
                yield f"{pods.where}, container {container['name']}: {fault}"


def _of_pod(pods: Pods) -> Iterator[str]:
    spec = pods.spec
    if not pods.component:
        yield f"has no label {NAME}, by which policies find it"
    if spec.get("automountServiceAccountToken") is not False:
        yield "mounts a token of the API server (automountServiceAccountToken: false)"
    if spec.get("enableServiceLinks") is not False:
        yield "gets variables of Services, such as MLFLOW_PORT (enableServiceLinks: false)"
    if not spec.get("serviceAccountName"):
        yield "has no ServiceAccount of its own"
    if any(spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
        yield "shares the node's network or processes"
    context = spec.get("securityContext", {})
    if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
        yield "may run as root (runAsNonRoot, runAsUser)"
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "has no seccomp profile (RuntimeDefault)"
    for volume in spec.get("volumes", []):
        if "hostPath" in volume:
            yield f"volume {volume['name']} is the node's disk"
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
            yield f"volume {volume['name']} has no sizeLimit"
    yield from _ending(pods)
    if pods.component == "trainer" and not any(_is_shared_memory(pods, c) for c in pods.containers):
        yield "has no memory at /dev/shm, of which a container has 64 MiB by itself"
    if pods.component == "inference":
        yield from _spool(pods)


def _ending(pods: Pods) -> Iterator[str]:
    grace = pods.spec.get("terminationGracePeriodSeconds", 30)
    waits = [c.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0) for c in pods.containers]
    needed = float(max(waits))
    if pods.component in HEALTH and pods.long_running and not needed:
        yield "ends before anybody has noticed (lifecycle.preStop.sleep)"
    if pods.component in APIS:
        needed += float(pods.variable("MEDLOOP_DRAIN_SECONDS") or 0) + STOP_SECONDS
    if grace < needed:
        yield f"is killed after {grace} s, but ending may take {needed:.0f} s (terminationGracePeriodSeconds)"


def _is_shared_memory(pods: Pods, container: dict[str, Any]) -> bool:
    memory = {v["name"] for v in pods.spec.get("volumes", []) if v.get("emptyDir", {}).get("medium") == "Memory"}
    return any(m["mountPath"] == "/dev/shm" and m["name"] in memory for m in container.get("volumeMounts", []))  # noqa: S108


def _spool(pods: Pods) -> Iterator[str]:
    folder, most = pods.variable("MEDLOOP_SPOOL_DIR"), int(pods.variable("MEDLOOP_SPOOL_MAX_BYTES") or 0)
    mounts = [m for c in pods.containers for m in c.get("volumeMounts", []) if m["mountPath"] == folder]
    volumes = {v["name"]: v for v in pods.spec["volumes"]}
    if not mounts or "emptyDir" not in volumes[mounts[0]["name"]]:
        yield "has no volume for the spool at MEDLOOP_SPOOL_DIR"
    elif not most or size(volumes[mounts[0]["name"]]["emptyDir"].get("sizeLimit", "0")) <= most:
        yield "its spool may grow to the volume's sizeLimit, and then the Pod is evicted (MEDLOOP_SPOOL_MAX_BYTES)"


def _of_container(pods: Pods, container: dict[str, Any]) -> Iterator[str]:
    resources = container.get("resources", {})
    for kind in ("requests", "limits"):
        unbound = [name for name in RESOURCES if name not in resources.get(kind, {})]
        if unbound:
            yield f"has no {kind} of {', '.join(unbound)}"
    context = container.get("securityContext", {})
    if context.get("readOnlyRootFilesystem") is not True:
        yield "may write to its image (readOnlyRootFilesystem)"
    if context.get("allowPrivilegeEscalation") is not False:
        yield "may gain rights (allowPrivilegeEscalation: false)"
    if "ALL" not in context.get("capabilities", {}).get("drop", []) or context["capabilities"].get("add"):
        yield "keeps capabilities (drop: [ALL])"
    image = container["image"]
    tag = image.rpartition("/")[2].partition(":")[2]
    if "@sha256:" not in image and tag in ("", "latest"):
        yield f"its image {image} is whatever is newest: name a tag or a digest"
    mounted = {mount["mountPath"] for mount in container.get("volumeMounts", [])}
    ours = image.rpartition("/")[2].startswith("medloop-")
    missing = {"/tmp", *(["/var/lib/medloop"] if ours else [])} - mounted  # noqa: S108 - the container's
    if missing:
        yield f"cannot write to {', '.join(sorted(missing))}"
    if pods.long_running and container in pods.spec["containers"]:
        yield from _probes(pods, container)


def _probes(pods: Pods, container: dict[str, Any]) -> Iterator[str]:
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        if name not in container:
            yield f"has no {name}"
        elif pods.component in HEALTH:
            wanted = HEALTH[pods.component][name == "readinessProbe"]
            asked = container[name].get("httpGet", {}).get("path")
            if asked != wanted:
                yield f"its {name} asks {asked}, where {pods.component} answers at {wanted}"
    ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
    if pods.component in DEFAULT_PORTS and ports.get("http") != DEFAULT_PORTS[pods.component]:
        yield f"its port http is {ports.get('http')}, not {DEFAULT_PORTS[pods.component]}"


def size(quantity: str) -> int:
    """Bytes of a Kubernetes quantity such as 512Mi."""
    return int(float(quantity[:-2]) * _UNITS[quantity[-2:]]) if quantity[-2:] in _UNITS else int(quantity)
