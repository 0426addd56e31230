"""The manifests are checked without a cluster, and the checks notice what they are for: mutate and see."""

import copy
import os
import re
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # ships no types
from medloop.approvals import Signer, Verifier
from medloop.auth.keys import ApiKeys
from medloop.cli import app
from medloop.cli.setup import DASHBOARD, DASHBOARD_SCOPES
from medloop.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    Preempted,
    TrainingFailed,
    Unauthenticated,
    Unavailable,
    UntrustedModel,
)
from medloop.schemas import Approval
from medloop.storage.records import open_records
from typer.core import TyperGroup
from typer.main import get_group

from k8s.check.__main__ import faults
from k8s.check.arrows import OVERLAYS as ARROWS
from k8s.check.render import CannotCheck, Document, copied, documents, find_kubectl, kustomize, render_all
from k8s.check.schema import faults as schema_faults
from k8s.overlays.dev import make_secrets

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def kubectl() -> str:
    try:
        return find_kubectl()
    except CannotCheck as exc:
        pytest.skip(str(exc))


@pytest.fixture(scope="module")
def tree(kubectl: str) -> Iterator[Path]:
    with copied() as found:
        yield found


@pytest.fixture(scope="module")
def rendered(kubectl: str, tree: Path) -> dict[str, list[Document]]:
    return {what: documents(text) for what, text in render_all(kubectl, tree).items()}


@pytest.fixture
def eks(rendered: dict[str, list[Document]]) -> list[Document]:
    return copy.deepcopy(rendered["overlays/eks"])


def one(found: list[Document], kind: str, name: str) -> Any:
    return next(d for d in found if (d["kind"], d["metadata"]["name"]) == (kind, name))


def container(found: list[Document], name: str) -> Any:
    return one(found, "Deployment", name)["spec"]["template"]["spec"]["containers"][0]


def test_overlays_and_components_have_no_faults(rendered: dict[str, list[Document]]) -> None:
    components = {path.name for path in (ROOT / "k8s" / "components").iterdir()}
    expected = {f"overlays/{name}" for name in ARROWS} | {f"components/{name} on eks" for name in components}
    assert set(rendered) == expected | {"all components on dev", "all components on eks"}
    assert [(what, fault) for what, found in rendered.items() for fault in faults(what, found)] == []


def without_limits(found: list[Document]) -> None:
    del container(found, "inference")["resources"]["limits"]


def without_probe(found: list[Document]) -> None:
    del container(found, "explainer")["readinessProbe"]


def asking_elsewhere(found: list[Document]) -> None:
    container(found, "evaluator")["livenessProbe"]["httpGet"]["path"] = "/"


def as_root(found: list[Document]) -> None:
    one(found, "Deployment", "mlflow")["spec"]["template"]["spec"]["securityContext"]["runAsNonRoot"] = False


def writing_to_its_image(found: list[Document]) -> None:
    container(found, "dashboard")["securityContext"]["readOnlyRootFilesystem"] = False


def with_capabilities(found: list[Document]) -> None:
    container(found, "dashboard")["securityContext"]["capabilities"] = {"drop": ["ALL"], "add": ["NET_ADMIN"]}


def newest_image(found: list[Document]) -> None:
    container(found, "dashboard")["image"] = "registry:5000/medloop-dashboard"


def killed_while_draining(found: list[Document]) -> None:
    one(found, "Deployment", "inference")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = 30


def spool_without_room(found: list[Document]) -> None:
    volumes = one(found, "Deployment", "inference")["spec"]["template"]["spec"]["volumes"]
    next(v for v in volumes if v["name"] == "spool")["emptyDir"]["sizeLimit"] = "256Mi"


def arrow_too_much(found: list[Document]) -> None:
    peers = one(found, "NetworkPolicy", "evaluator")["spec"]["ingress"][0]["from"]
    peers.append({"podSelector": {"matchLabels": {"app.kubernetes.io/name": "inference"}}})


def arrow_to_everybody(found: list[Document]) -> None:
    one(found, "NetworkPolicy", "inference")["spec"]["egress"].append({"ports": [{"protocol": "TCP", "port": 443}]})


def arrow_missing(found: list[Document]) -> None:
    one(found, "NetworkPolicy", "dashboard")["spec"]["egress"].pop()


def private_addresses(found: list[Document]) -> None:
    one(found, "NetworkPolicy", "to-objects")["spec"]["egress"][0]["to"][0]["ipBlock"]["except"].remove("10.0.0.0/8")


def open_by_default(found: list[Document]) -> None:
    found.remove(one(found, "NetworkPolicy", "default-deny"))


def unknown_setting(found: list[Document]) -> None:
    config = next(d for d in found if d["kind"] == "ConfigMap" and d["metadata"]["name"].startswith("medloop-"))
    config["data"]["MEDLOOP_DRAIN_SECOND"] = "5"


def secret_that_nobody_makes(found: list[Document]) -> None:
    found.remove(one(found, "ExternalSecret", "approval-trust"))


def all_on_one_node(found: list[Document]) -> None:
    found.remove(one(found, "PodDisruptionBudget", "explainer"))


def scaled_by_nothing(found: list[Document]) -> None:
    autoscaler = one(found, "HorizontalPodAutoscaler", "inference")["spec"]
    autoscaler["metrics"][0]["pods"]["metric"]["name"] = "medloop_queue_seconds"


def wrong_port(found: list[Document]) -> None:
    one(found, "Service", "inference")["spec"]["ports"][0]["port"] = 80


def baseline(found: list[Document]) -> None:
    one(found, "Namespace", "medloop")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] = "baseline"


@pytest.mark.parametrize(
    ("mutate", "said"),
    [
        (without_limits, "Deployment inference, container inference: has no limits of cpu, memory, ephemeral-storage"),
        (without_probe, "Deployment explainer, container explainer: has no readinessProbe"),
        (asking_elsewhere, "its livenessProbe asks /, where evaluator answers at /livez"),
        (as_root, "Deployment mlflow: may run as root"),
        (writing_to_its_image, "may write to its image"),
        (with_capabilities, "keeps capabilities"),
        (newest_image, "is whatever is newest"),
        (killed_while_draining, "Deployment inference: is killed after 30 s, but ending may take 45 s"),
        (spool_without_room, "its spool may grow to the volume's sizeLimit"),
        (arrow_too_much, "the arrow inference → evaluator, port 5006, is let in, which the design does not have"),
        (arrow_to_everybody, "NetworkPolicy inference: an egress rule without peers is for everybody"),
        (arrow_missing, "the arrow dashboard → inference, port 8080, cannot leave, as the design has it"),
        (private_addresses, "NetworkPolicy to-objects: 0.0.0.0/0 is allowed on port 443 and without private addresses"),
        (open_by_default, "no policy denies everything first"),
        (unknown_setting, "nobody reads MEDLOOP_DRAIN_SECOND "),
        (secret_that_nobody_makes, "Deployment inference: there is no Secret approval-trust"),
        (all_on_one_node, "Deployment explainer: all its Pods may be taken away at once"),
        (scaled_by_nothing, "HorizontalPodAutoscaler inference: nobody tells medloop_queue_seconds"),
        (wrong_port, "Service inference: its port is 80, where inference has 8080"),
        (baseline, "Namespace medloop: takes Pods that are not restricted"),
    ],
)
def test_each_fault_is_told(eks: list[Document], mutate: Callable[[list[Document]], None], said: str) -> None:
    mutate(eks)
    told = [each for each in faults("overlays/eks", eks) if said in each]
    assert told, said


def test_an_overlay_with_an_unknown_field_is_told(kubectl: str, tree: Path) -> None:
    overlay = tree / "overlays" / "typo"
    overlay.mkdir()
    patch = "- {op: add, path: /spec/template/spec/containers/0/livenessprobe, value: {}}"
    asked = {"resources": ["../eks"], "patches": [{"target": {"kind": "Deployment", "name": "mlflow"}, "patch": patch}]}
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(asked))
    told = [fault for d in documents(kustomize(kubectl, overlay)) for fault in schema_faults(d)]
    assert len(told) == 1
    assert re.search(r"Deployment mlflow: .*'livenessprobe' was unexpected", told[0])


def test_a_kind_that_no_schema_knows_is_told() -> None:
    unknown = {"apiVersion": "apps/v1beta1", "kind": "Deployment", "metadata": {"name": "old"}}
    assert "Deployment old: neither Kubernetes" in next(schema_faults(unknown))


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ('{"clientVersion": {"major": "1", "minor": "20+", "gitVersion": "v1.20.5"}}', "is kubectl v1.20.5, and"),
        ("no version", "does not tell its version"),
    ],
)
def test_a_kubectl_that_is_too_old_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, reason: str
) -> None:
    old = program(tmp_path / "kubectl", f"echo '{said}'")
    monkeypatch.setenv("KUBECTL", str(old))
    with pytest.raises(CannotCheck, match=reason):
        find_kubectl()
    monkeypatch.setenv("KUBECTL", str(tmp_path / "nothing"))
    with pytest.raises(CannotCheck, match="kubectl was not found: install"):
        find_kubectl()


def test_every_training_has_a_gpu_where_that_component_is_added(rendered: dict[str, list[Document]]) -> None:
    found = rendered["all components on eks"]
    jobs = [d for d in found if d["kind"] == "Job" and d["metadata"]["labels"]["app.kubernetes.io/name"] == "trainer"]
    specs = [job["spec"]["template"]["spec"] for job in jobs]
    specs.append(one(found, "CronJob", "retrain")["spec"]["jobTemplate"]["spec"]["template"]["spec"])
    specs.append(one(found, "ScaledJob", "retrain")["spec"]["jobTargetRef"]["template"]["spec"])
    runtime = one(found, "TrainingRuntime", "medloop")["spec"]["template"]["spec"]["replicatedJobs"][0]
    specs.append(runtime["template"]["spec"]["template"]["spec"])
    assert [spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] for spec in specs] == ["1"] * 6


def test_a_pod_is_made_anew_unless_it_would_fail_again(rendered: dict[str, list[Document]]) -> None:
    found = rendered["all components on eks"]
    jobs = {d["metadata"]["name"]: d["spec"] for d in found if d["kind"] == "Job"}
    jobs |= {d["metadata"]["name"]: d["spec"]["jobTemplate"]["spec"] for d in found if d["kind"] == "CronJob"}
    jobs["retrain by events"] = one(found, "ScaledJob", "retrain")["spec"]["jobTargetRef"]
    given_up = {
        name: {status for rule in policy["rules"] for status in rule.get("onExitCodes", {"values": []})["values"]}
        for name, job in jobs.items()
        if (policy := job.get("podFailurePolicy"))
    }
    training = {error.exit_status for error in (InvalidRequest, NotFound, UntrustedModel, TrainingFailed)}
    asking = {error.exit_status for error in (InvalidRequest, Unauthenticated, NotFound)}
    assert given_up == {
        **dict.fromkeys(("retrain", "retrain by events", "train", "search"), training),
        "evaluate": asking | {UntrustedModel.exit_status},
        "score": asking,
        "train-distributed": set(),
        "build-dataset": {InvalidRequest.exit_status, Conflict.exit_status},
    }
    assert not {Preempted.exit_status, Unavailable.exit_status} & (training | asking)


def test_jobs_give_commands_that_there_are(rendered: dict[str, list[Document]]) -> None:
    found = rendered["components/dataset on eks"]
    [asking] = one(found, "CronJob", "evaluate")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    [building] = one(found, "Job", "build-dataset")["spec"]["template"]["spec"]["containers"]
    assert asking["image"] == building["image"] == container(found, "evaluator")["image"]
    group = get_group(app)
    datasets = group.commands["dataset"]
    assert isinstance(datasets, TyperGroup)
    for given, command in (
        (asking["command"][4:], group.commands["evaluate"]),
        (building["args"], datasets.commands["build"]),
    ):
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word.partition("=")[0] for word in given if word.startswith("--")} <= options
    assert asking["command"][:4] == ["python", "-m", "medloop.cli", "evaluate"]
    assert building["command"] == ["python", "-m", "medloop.cli", "dataset", "build"]


def test_every_component_on_eks_has_the_role_that_is_made_for_it(rendered: dict[str, list[Document]]) -> None:
    eks = rendered["components/dataset on eks"]
    roles = (ROOT / "infra" / "aws" / "access.yaml").read_text()
    associated = re.findall(r"^      Namespace: medloop\n      ServiceAccount: (\S+)$", roles, re.MULTILINE)
    [asking] = one(eks, "NetworkPolicy", "to-pod-identity")["spec"]["podSelector"]["matchExpressions"]
    assert sorted([*asking["values"], "dataset"]) == sorted(associated)
    accounts = {d["metadata"]["name"] for d in eks if d["kind"] == "ServiceAccount"}
    assert accounts == {*associated, "evaluate"}  # which asks the evaluator and MLflow, and nothing of AWS


@pytest.mark.parametrize(
    "name", ["batch-scoring", "dataset", "distributed-training", "kubeflow-training", "search", "training"]
)
def test_the_label_of_a_component_with_a_job_selects_all_that_it_brings(
    rendered: dict[str, list[Document]], name: str
) -> None:
    """`kubectl apply -l` leaves nothing out, and an apply without the component takes nothing back."""
    plain = rendered["overlays/eks"]
    brought = [document for document in rendered[f"components/{name} on eks"] if document not in plain]
    assert {"Job", "TrainJob"} & {document["kind"] for document in brought}
    labels = [document["metadata"].get("labels", {}).get("app.kubernetes.io/component") for document in brought]
    assert set(labels) == {name}
    there = {(document["kind"], document["metadata"]["name"]) for document in plain}
    assert there.isdisjoint((document["kind"], document["metadata"]["name"]) for document in brought)


def test_alerts_of_the_documentation_are_the_ones_that_are_deployed(rendered: dict[str, list[Document]]) -> None:
    groups = one(rendered["components/monitoring on eks"], "PrometheusRule", "medloop")["spec"]["groups"]
    deployed = {rule["alert"]: (rule["expr"], rule.get("for")) for group in groups for rule in group["rules"]}
    block = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "metrics.md").read_text(), re.DOTALL)
    assert block is not None
    written = {rule["alert"]: (rule["expr"], rule.get("for")) for rule in yaml.safe_load(block[1])}
    assert written == {name: deployed.get(name) for name in written}


def test_secrets_of_dev_are_drawn_and_kept(tmp_path: Path) -> None:
    given = {
        "MEDLOOP_OBJECTS_URL": "s3://images/here/",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "key",
        "AWS_REGION": "eu-central-1",
    }
    for missing in given:
        with pytest.raises(InvalidRequest, match=missing):
            make_secrets.write(tmp_path / "none", {**given, missing: ""})
    with pytest.raises(InvalidRequest, match="s3://"):
        make_secrets.write(tmp_path / "none", given | {"MEDLOOP_OBJECTS_URL": "file:///images"})
    first, second = tmp_path / "first", tmp_path / "second"
    make_secrets.write(first, given)
    make_secrets.write(second, given)
    assert not (tmp_path / "none").exists()
    for path in first.iterdir():
        drawn = path.stem not in ("bucket", "objects")
        assert (path.read_bytes() != (second / path.name).read_bytes()) is drawn, path.name
        assert drawn is False or path.suffix == ".pub" or stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(Conflict):
        make_secrets.write(first, given)


def test_the_dashboards_key_of_dev_is_one_that_setup_puts_on_record(tree: Path, tmp_path: Path) -> None:
    secrets = tree / "overlays" / "dev" / "secrets"
    text = (secrets / "dashboard-key.env").read_text().strip().removeprefix("MEDLOOP_API_KEY=")
    records = open_records(f"sqlite:///{tmp_path}/records.sqlite")
    assert ApiKeys(records).adopt(text, DASHBOARD, DASHBOARD_SCOPES).name == DASHBOARD
    records.close()


def test_inference_of_dev_trusts_what_its_evaluator_signs(tree: Path, tmp_path: Path) -> None:
    secrets = tree / "overlays" / "dev" / "secrets"
    evaluator, inference = tmp_path / "evaluator", tmp_path / "inference"
    for folder, name in ((evaluator, "approval.key"), (inference, "approval.pub")):
        folder.mkdir()
        (folder / name).write_bytes((secrets / name).read_bytes())
    subject = {"model": "cells", "version": "1", "bundle_digest": "0" * 64}
    unsigned = Approval(sequence=1, action="approve", decision_id="1", approver="ann", key_id="", **subject)
    Verifier.open(inference).check(Signer.open(evaluator).sign(unsigned), **subject)


def test_inference_can_add_no_key_to_those_that_it_trusts(eks: list[Document]) -> None:
    inference = container(eks, "inference")
    [trusted] = [each["value"] for each in inference["env"] if each["name"] == "MEDLOOP_TRUSTED_KEYS"]
    read_only = {mount["mountPath"]: mount.get("readOnly", False) for mount in inference["volumeMounts"]}
    assert [where for where, fixed in read_only.items() if Path(trusted).is_relative_to(where)] == [trusted]
    assert read_only[trusted]


def program(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return path


def train_sh(folder: Path, *trainer: str, **environment: str) -> "subprocess.Popen[bytes]":
    """train.sh with a stand-in of Python that writes into `folder`/calls how it is called."""
    program(
        folder / "python",
        f'echo "$*" >> {folder / "calls"}',
        'case "$*" in',
        """*'dataset show cells'*) echo '{"id": "0123"}' ;;""",
        '-c*) exec python3 "$@" ;;',
        *trainer,
        "esac",
    )
    command = ["sh", str(ROOT / "k8s" / "base" / "trainer" / "train.sh"), "retrain", "--epochs=3"]
    known = {"PATH": f"{folder}:{os.environ['PATH']}", "MEDLOOP_MODEL": "cells"}
    return subprocess.Popen(command, env=known | environment)


@pytest.mark.parametrize("launcher", ["", "python -m torch.distributed.run --nnodes=2"])
def test_a_pod_trains_on_the_newest_version(tmp_path: Path, launcher: str) -> None:
    given = {"LAUNCHER": launcher} if launcher else {}
    assert train_sh(tmp_path, "*medloop_trainer*) exit 9 ;;", **given).wait(timeout=60) == 9
    trained = (
        f"{launcher.removeprefix('python ')} -m medloop_trainer retrain --model cells --dataset-id 0123 --epochs=3"
    )
    assert (tmp_path / "calls").read_text().splitlines()[-1] == trained.strip()


def test_a_signal_reaches_the_trainer_whose_own_status_is_the_pods(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    os.mkfifo(ready)
    wait = f"trap 'exit 75' TERM; echo listening > {ready}; while :; do sleep 0.05; done"
    process = train_sh(tmp_path, f"*medloop_trainer*) {wait} ;;")
    assert ready.read_text() == "listening\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75


def test_a_message_begins_what_the_weekly_training_does(rendered: dict[str, list[Document]]) -> None:
    found = rendered["components/event-retraining on eks"]
    [weekly] = one(found, "CronJob", "retrain")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    scaled = one(found, "ScaledJob", "retrain")["spec"]
    [on_message] = scaled["jobTargetRef"]["template"]["spec"]["containers"]
    assert on_message["args"] == [*weekly["command"], *weekly["args"]]
    for name in ("image", "envFrom", "resources", "securityContext"):
        assert on_message[name] == weekly[name], name
    # The script and its queue are in the Pod.
    script = Path(on_message["command"][1])
    [mounted] = [m["name"] for m in on_message["volumeMounts"] if m["mountPath"] == str(script.parent)]
    volumes = {volume["name"]: volume for volume in scaled["jobTargetRef"]["template"]["spec"]["volumes"]}
    assert script.name in one(found, "ConfigMap", volumes[mounted]["configMap"]["name"])["data"]
    # Both hear of one queue, the overlay's.
    [config] = [d["data"] for d in found if d["kind"] == "ConfigMap" and "RETRAINING_QUEUE" in d["data"]]
    [trigger] = scaled["triggers"]
    assert trigger["metadata"]["queueURL"] == config["RETRAINING_QUEUE"]
    assert config["RETRAINING_QUEUE"].startswith(f"https://sqs.{trigger['metadata']['awsRegion']}.amazonaws.com/")
    assert config["RETRAINING_QUEUE"].endswith("/medloop-retraining")
    assert scaled["maxReplicaCount"] == 1


def test_pods_of_one_training_know_what_they_have_in_common(rendered: dict[str, list[Document]]) -> None:
    found = rendered["all components on eks"]
    trainings = [one(found, "Job", name)["spec"]["template"]["spec"] for name in ("train", "train-distributed")]
    trainings.append(one(found, "CronJob", "retrain")["spec"]["jobTemplate"]["spec"]["template"]["spec"])
    trainings.append(one(found, "ScaledJob", "retrain")["spec"]["jobTargetRef"]["template"]["spec"])
    for spec in trainings:
        given = {variable["name"]: variable for variable in spec["containers"][0]["env"]}
        uid = given["MEDLOOP_LAUNCH"]["valueFrom"]["fieldRef"]["fieldPath"]
        assert uid == "metadata.labels['batch.kubernetes.io/controller-uid']"
        assert "--rdzv-id=$(MEDLOOP_LAUNCH)" in given.get("LAUNCHER", {"value": "--rdzv-id=$(MEDLOOP_LAUNCH)"})["value"]
