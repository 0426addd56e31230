"""What docs/deploying.md tells people to type: its paths, make targets, stacks' parameters and outputs, secrets and
settings are those of the tree."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # ships no types

from k8s.check.render import CannotCheck, copied, find_kubectl, kustomize

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "deploying.md").read_text()
COMMANDS = PAGE.replace("\\\n", " ")
SETTING = r"\b(?:MEDLOOP|MLFLOW|POSTGRES|MONGO|S3|DASHBOARD|PUBLISH|INFERENCE|TRAINER|DEV|ECR|EKS|DEPLOY)_[A-Z0-9_]+\b"
FOLDERS = r"(?<![\w/.-])((?:\.github|benchmarks|docs|infra|k8s|services|tests)/[\w.*/-]*\w/?)"


class Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml ships no types
    """CloudFormation's short forms, read as text."""


Loader.add_multi_constructor("!", lambda loader, suffix, node: suffix)


@cache
def load(path: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.load((ROOT / path).read_text(), Loader)
    return found


def stacks() -> Iterator[tuple[str, str, set[str]]]:
    """Each deployed stack's name, its template and the parameters it is given."""
    for found in re.finditer(r"cloudformation deploy --stack-name (\S+) --template-file (\S+)(.*)", COMMANDS):
        yield found[1], found[2], set(re.findall(r"\b([A-Z]\w+)=", found[3].partition("--parameter-overrides")[2]))


def test_every_path_exists() -> None:
    made = set(re.findall(r"mkdir -p (\S+)|cp -r \S+ (\S+)", PAGE))
    made = {path for pair in made for path in pair if path}
    named = {path for path in re.findall(FOLDERS, PAGE) if not path.startswith(tuple(made))}
    assert len(named) > 15
    assert [path for path in sorted(named) if not any(ROOT.glob(path.rstrip("/")))] == []


def test_every_link_leads_somewhere() -> None:
    headings = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.*)", PAGE, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        path, _, heading = target.partition("#")
        if not path:
            assert heading in headings, target
        elif not path.startswith("https://"):
            assert (ROOT / "docs" / path).exists(), target


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z0-9%-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:`|^|&& |: )make ([a-z0-9-]+)", PAGE, re.M))
    assert named
    assert {"image-%" if name.startswith("image-") else name for name in named} <= targets


def test_every_setting_is_known() -> None:
    """To the stack, to a service, to the manifests, or to the workflows that deploy."""
    files = [ROOT / ".env.example", ROOT / "docker-compose.yml"]
    files += [*(ROOT / ".github").rglob("*"), *(ROOT / "infra").rglob("*"), *(ROOT / "k8s").rglob("*.yaml")]
    known = "\n".join(file.read_text() for file in files if file.is_file())
    theirs = {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"}  # which MLflow's own client reads
    assert [name for name in sorted(set(re.findall(SETTING, PAGE)) - theirs) if name not in known] == []


def test_stacks_get_the_parameters_that_they_have_and_need() -> None:
    deployed = {template: given for _, template, given in stacks()}
    assert set(deployed) == {f"infra/aws/{path.name}" for path in (ROOT / "infra" / "aws").glob("*.yaml")}
    for template, given in deployed.items():
        parameters = load(template)["Parameters"]
        needed = {name for name, parameter in parameters.items() if "Default" not in parameter}
        assert needed <= given <= set(parameters), template


def test_only_outputs_and_resources_that_a_stack_has_are_asked_for() -> None:
    templates = {name: template for name, template, _ in stacks()}
    resources = re.findall(r"\$\(resource (\w+)\)", COMMANDS)
    assert len(resources) == 3
    assert set(resources) <= set(load(templates["medloop-database"])["Resources"])
    asked = re.findall(r"\$\(output (\S+) (\w+)\)", COMMANDS)
    assert asked
    for stack, output in asked:
        assert output in load(templates[stack])["Outputs"], (stack, output)


def test_what_others_make_is_pinned_and_fits_together() -> None:
    """The controller's definitions and rights are of its own version, the autoscaler's image of the cluster's."""
    told = COMMANDS + (ROOT / "k8s" / "README.md").read_text()
    charts = re.findall(r"helm install \S+ (\S+)/(\S+) --version (\d+\.\d+\.\d+) ", told)
    assert len(charts) == told.count("helm install ") == 6
    assert {repository for repository, _, _ in charts} == set(re.findall(r"helm repo add (\S+) https://", told))
    versions = {chart: version for _, chart, version in charts}
    (controller,) = re.findall(r"aws-load-balancer-controller/v(\S+)$", COMMANDS, re.M)
    assert controller == versions["aws-load-balancer-controller"]
    assert "refs/heads" not in PAGE
    assert "latest/download" not in PAGE
    kubernetes = re.search(r'version: "([\d.]+)"', (ROOT / "infra" / "aws" / "eks" / "cluster.yaml").read_text())
    assert kubernetes
    assert f"image.tag=v{kubernetes[1]}." in COMMANDS


def test_policies_that_are_typed_are_policies() -> None:
    found = [json.loads(text) for text in re.findall(r"'(\{\"Version\".*?\})'", PAGE, re.S)]
    assert len(found) == 2
    for policy in found:
        assert policy["Version"] == "2012-10-17"
        assert {statement["Effect"] for statement in policy["Statement"]} == {"Allow"}


def test_no_secret_stands_in_what_a_pod_is_made_of() -> None:
    for command in re.findall(r"kubectl run [^\n]*", COMMANDS):
        assert "secret" not in command
        assert "--stdin" in command


def test_what_is_deployed_by_hand_is_what_the_environment_names() -> None:
    workflow = (ROOT / ".github" / "workflows" / "deploy-prod.yml").read_text()
    assert "vars.OVERLAY || 'k8s/overlays/eks'" in workflow
    made = set(re.findall(r"(?:mkdir -p|cp -r \S+) (k8s/overlays/[a-z-]+)", PAGE))
    assert set(re.findall(r"apply -k (k8s/overlays/[a-z-]+)", COMMANDS)) <= made
    assert {"k8s/overlays/mine", "k8s/overlays/staging", "k8s/overlays/staging-mine"} <= made


def test_overlays_are_made_by_the_commands_as_they_stand_here() -> None:
    """All of steps 6 to 8 and of staging that changes a file, typed in this order; then rendered, as an apply would."""
    try:
        kubectl = find_kubectl()
    except CannotCheck as exc:
        pytest.skip(str(exc))
    typed = re.findall(r"^(?:sed -i .*|cp -r k8s.*|mkdir -p k8s[\s\S]*?\nEND)$", PAGE, re.M)
    assert len(typed) == 9
    script = "\n".join(typed).replace("monitoring]", "monitoring, ../../components/event-retraining]")
    production, staging = "1" * 12, "2" * 12
    script = script.replace("PRODUCTION_ACCOUNT", production).replace("PRODUCTION_REGION", "eu-west-3")
    script = script.replace("cp -r", f"ACCOUNT={staging} AWS_REGION=us-west-2; cp -r", 1)
    known = {"ACCOUNT": production, "AWS_REGION": "eu-west-3", "ARN": "arn:aws:elasticloadbalancing:of/medloop"}
    with copied() as k8s:
        subprocess.run(["bash", "-euc", script], cwd=k8s.parent, env=known | {"PATH": os.environ["PATH"]}, check=True)
        mine, theirs, training = (
            kustomize(kubectl, k8s / "overlays" / name) for name in ("mine", "staging-mine", "eks-train")
        )
    for rendered in (mine, theirs, training):
        for left in ("111122223333", "eu-central-1", "medloop.example.com", "loadbalancer/app/NAME/ID"):
            assert left not in rendered
        images = set(re.findall(r"image: (.*medloop-.*)", rendered))
        assert len(images) == 6
        assert {re.sub(r"medloop-\w+", "", image) for image in images} == {
            f"{production}.dkr.ecr.eu-west-3.amazonaws.com/:COMMIT"
        }
    rest = re.sub(r"image: .*", "", theirs)
    assert production not in rest
    assert "eu-west-3" not in rest
    assert f"queueURL: https://sqs.us-west-2.amazonaws.com/{staging}/medloop-retraining" in rest
    assert "awsRegion: us-west-2" in rest


def test_every_secret_that_the_cluster_fetches_is_made() -> None:
    fetched = set(
        re.findall(r"key: medloop/([a-z-]+)", (ROOT / "k8s" / "overlays" / "eks" / "secrets.yaml").read_text())
    )
    kept = set(re.findall(r"^keep ([a-z-]+) ", PAGE, re.M))
    by_stack = {"mlflow-database"}
    assert kept | by_stack == fetched
    assert "Name: !Sub ${Name}/mlflow-database" in (ROOT / "infra" / "aws" / "database.yaml").read_text()


def test_workloads_are_those_of_the_manifests() -> None:
    named = set(re.findall(r"\bdeployment/([a-z]+)", PAGE))
    assert named
    for name in named:
        assert (ROOT / "k8s" / "base" / name / "deployment.yaml").exists(), name


@pytest.mark.parametrize("verb", ["run --rm", "exec -T"])
def test_compose_knows_the_services(verb: str) -> None:
    services = load("docker-compose.yml")["services"]
    named = re.findall(rf"docker compose {verb} ([a-z]+)", PAGE)
    assert named
    assert set(named) <= set(services)


def test_the_volumes_to_back_up_are_the_stacks() -> None:
    saved, restored = (set(listed.split()) for listed in re.findall(r"for volume in ([^;]+);", PAGE))
    assert saved == restored <= set(load("docker-compose.yml")["volumes"])


def test_every_command_of_ours_exists() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "shared" / "medloop" / "cli").glob("*.py"))
    for command in set(re.findall(r"(?:bin/medloop|`medloop|--rm cli) ([a-z]+)", PAGE)):
        assert re.search(rf"\b(?:def {command}\b|name=\"{command}\"|\"{command}\")", sources), command
