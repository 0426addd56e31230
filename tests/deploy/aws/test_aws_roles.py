"""Who may do what: no role more than its component's code does, each for one service account or workflow alone.

What is refused is asked of moto through the store that services use; moto heeds no conditions, so those are read.
"""

import re
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from medloop.data.build import BuiltDataset, build_dataset
from medloop.data.sources import RawImage, open_source, phantom_source
from medloop.errors import NotFound, StorageUnavailable
from medloop.storage.objects import open_objects
from medloop.storage.s3 import S3Objects
from moto.core import set_initial_no_auth_action_count

if TYPE_CHECKING:
    from tests.deploy.aws.conftest import Cloud

ACCOUNT, REGION = "123456789012", "eu-central-1"
OBJECTS = f"medloop-objects-{ACCOUNT}-{REGION}"
ARTIFACTS = f"medloop-artifacts-{ACCOUNT}-{REGION}"
BESIDE_STORAGE = ("access", "github")
IMAGES = {"trainer", "evaluator", "explainer", "inference", "dashboard", "mlflow"}
RUN = "0/3f2a/artifacts/"

# What each component gets, puts and deletes, by folder: of objects, and of a run's artifacts.
MAY: dict[str, dict[str, set[str]]] = {
    "inference": {
        "get": {"images/", "spool/", RUN + "bundle/"},
        "put": {"images/", "spool/", "spool-aside/"},
        "delete": {"spool/"},
    },
    "evaluator": {
        "get": {"images/", "datasets/", "evaluations/", RUN + "bundle/"},
        "put": {"evaluations/", RUN + "evaluation/"},
        "delete": set(),
    },
    "explainer": {
        "get": {"images/", "datasets/", RUN + "bundle/"},
        "put": {RUN + "explanations/"},
        "delete": set(),
    },
    "trainer": {
        "get": {"images/", "datasets/", "lineages/", "decoded/", "training/", RUN + "bundle/", RUN + "training/"},
        "put": {"decoded/", "training/", RUN + "bundle/", RUN + "search/", RUN + "training/"},
        "delete": {"training/"},
    },
    "dataset": {
        "get": {"incoming/", "images/", "datasets/", "lineages/"},
        "put": {"images/", "datasets/", "lineages/"},
        "delete": set(),
    },
    "dashboard": {
        "get": {"images/", "datasets/"}
        | {RUN + folder for folder in ("bundle/", "evaluation/", "explanations/", "search/", "training/")},
        "put": set(),
        "delete": set(),
    },
    "mlflow": {
        "get": {RUN + folder for folder in ("bundle/", "evaluation/", "explanations/", "search/", "training/")},
        "put": set(),
        "delete": set(),
    },
    "external-secrets": {"get": set(), "put": set(), "delete": set()},
    "keda-operator": {"get": set(), "put": set(), "delete": set()},
}
NAMESPACES = {"external-secrets": "external-secrets", "keda-operator": "keda"}
FOLDERS = sorted(
    {
        *("images/", "datasets/", "lineages/", "evaluations/", "decoded/", "training/", "spool/", "spool-aside/"),
        *(RUN + folder for folder in ("bundle/", "evaluation/", "explanations/", "search/", "training/")),
        *("incoming/", "elsewhere/", "0/3f2a/"),
    }
)


def policies(cloud: "Cloud") -> dict[str, list[dict[str, Any]]]:
    """The statements of each role, by its name."""
    iam = cloud.client("iam")
    found: dict[str, list[dict[str, Any]]] = {}
    for role in iam.list_roles()["Roles"]:
        name = role["RoleName"]
        assert not iam.list_attached_role_policies(RoleName=name)["AttachedPolicies"]
        found[name] = [
            statement
            for policy in iam.list_role_policies(RoleName=name)["PolicyNames"]
            for statement in iam.get_role_policy(RoleName=name, PolicyName=policy)["PolicyDocument"]["Statement"]
        ]
    return found


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def test_no_role_may_do_everything(cloud: "Cloud") -> None:
    found = policies(cloud)
    assert found.keys() == {f"medloop-{name}" for name in [*MAY, "github-publisher", "github-deployer"]}
    for role, statements in found.items():
        for statement in statements:
            assert statement["Effect"] == "Allow"
            assert not {"NotAction", "NotResource"} & statement.keys()
            assert not [action for action in listed(statement["Action"]) if "*" in action], role
            if statement["Action"] != "ecr:GetAuthorizationToken":  # AWS knows it for the whole account only
                assert not [resource for resource in listed(statement["Resource"]) if resource in ("*", "arn:*")], role


def test_pods_do_with_objects_what_their_code_does_and_no_more(cloud: "Cloud") -> None:
    tried = {
        (role, verb, folder): allowed
        for role in MAY
        for (verb, folder), allowed in outcomes(cloud, f"medloop-{role}").items()
    }
    wanted = {
        (role, verb, folder): folder in MAY[role][verb]
        for role, verb, folder in product(MAY, ("get", "put", "delete"), FOLDERS)
    }
    assert {what: allowed for what, allowed in tried.items() if allowed != wanted[what]} == {}
    assert len(tried) == len(wanted)


def outcomes(cloud: "Cloud", role: str) -> dict[tuple[str, str], bool]:
    """Whether the role, asked through the store that services use, is let through."""
    keys = keys_of(cloud, role)
    s3 = boto3.client(
        "s3",
        region_name=REGION,
        aws_access_key_id=keys["AccessKeyId"],
        aws_secret_access_key=keys["SecretAccessKey"],
        aws_session_token=keys["SessionToken"],
    )
    found: dict[tuple[str, str], bool] = {}

    @set_initial_no_auth_action_count(0)
    def ask() -> None:
        for folder in FOLDERS:
            store = S3Objects(s3, ARTIFACTS if folder.startswith("0/") else OBJECTS)
            for verb in ("get", "put", "delete"):
                found[verb, folder] = let_through(store, verb, f"{folder}file")

    ask()
    return found


def keys_of(cloud: "Cloud", role: str) -> dict[str, str]:
    """What a Pod with that role is given."""
    arn = f"arn:aws:iam::{ACCOUNT}:role/{role}"
    found: dict[str, str] = cloud.client("sts").assume_role(RoleArn=arn, RoleSessionName="pod")["Credentials"]
    return found


def let_through(store: S3Objects, verb: str, key: str) -> bool:
    try:
        if verb == "put":
            store.put(key, b"")
        elif verb == "get":
            store.get(key)
        else:
            store.delete(key)
    except NotFound:
        return True
    except StorageUnavailable as exc:
        if "AccessDenied" not in exc.detail:
            raise
        return False
    return True


def test_a_build_needs_no_more_than_its_role(cloud: "Cloud", monkeypatch: pytest.MonkeyPatch) -> None:
    incoming = S3Objects(cloud.client("s3"), OBJECTS, "incoming/cells/")
    for n, image in enumerate(phantom_source(per_class=4, size=16).read()):
        assert isinstance(image, RawImage)
        incoming.put(f"{image.label}/{n}.png", image.data)
    keys = keys_of(cloud, "medloop-dataset")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # which has read the environment
    for name in ("AccessKeyId", "SecretAccessKey", "SessionToken"):
        monkeypatch.setenv("AWS" + re.sub("([A-Z])", r"_\1", name).upper(), keys[name])

    @set_initial_no_auth_action_count(0)
    def build() -> BuiltDataset:
        url = f"s3://{OBJECTS}"
        return build_dataset(open_source(f"{url}/incoming/cells"), open_objects(url), name="cells")

    first = build()
    assert len(first.manifest.rows) == 24
    assert build().manifest.id == first.manifest.id, "also of what is there"


def test_pods_may_list_the_buckets_that_they_read(cloud: "Cloud") -> None:
    # Without it S3 says "forbidden" of a key that does not exist, and services could not tell that it is not there.
    found = policies(cloud)
    for name, may in MAY.items():
        lists = {
            resource
            for statement in found[f"medloop-{name}"]
            if statement["Action"] == "s3:ListBucket"
            for resource in listed(statement["Resource"])
        }
        assert lists == {f"arn:aws:s3:::{ARTIFACTS if folder.startswith(RUN) else OBJECTS}" for folder in may["get"]}


def test_pods_use_the_key_for_s3_alone(cloud: "Cloud") -> None:
    found = policies(cloud)
    for name, may in MAY.items():
        uses = [statement for statement in found[f"medloop-{name}"] if "kms:" in str(statement["Action"])]
        assert len(uses) == bool(may["get"])
        for use in uses:
            # Writing needs the first, and reading back what was written in parts the second.
            assert set(listed(use["Action"])) == {"kms:Decrypt"} | ({"kms:GenerateDataKey"} if may["put"] else set())
            assert use["Resource"] == cloud.outputs["storage"]["KeyArn"]
            assert use["Condition"] == {"StringEquals": {"kms:ViaService": f"s3.{REGION}.amazonaws.com"}}


def test_external_secrets_reads_ours_alone(cloud: "Cloud") -> None:
    [statement] = policies(cloud)["medloop-external-secrets"]
    assert statement["Action"] == ["secretsmanager:DescribeSecret", "secretsmanager:GetSecretValue"]
    assert statement["Resource"] == f"arn:aws:secretsmanager:{REGION}:{ACCOUNT}:secret:medloop/*"


def test_only_keda_sees_the_queue_and_only_the_trainer_takes_from_it(cloud: "Cloud") -> None:
    queue = cloud.client("sqs").get_queue_url(QueueName="medloop-retraining")["QueueUrl"]
    arn = cloud.client("sqs").get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])["Attributes"][
        "QueueArn"
    ]
    uses = {
        role: [statement["Resource"], *sorted(listed(statement["Action"]))]
        for role, statements in policies(cloud).items()
        for statement in statements
        if "sqs:" in str(statement["Action"])
    }
    assert uses == {
        "medloop-trainer": [arn, "sqs:DeleteMessage", "sqs:ReceiveMessage"],
        "medloop-keda-operator": [arn, "sqs:GetQueueAttributes"],
    }


def trust(cloud: "Cloud", role: str) -> dict[str, Any]:
    [statement] = cloud.client("iam").get_role(RoleName=role)["Role"]["AssumeRolePolicyDocument"]["Statement"]
    assert isinstance(statement, dict)
    return statement


@pytest.mark.parametrize("name", MAY)
def test_a_role_is_its_service_accounts_alone(cloud: "Cloud", name: str) -> None:
    namespace = NAMESPACES.get(name, "medloop")
    assert trust(cloud, f"medloop-{name}") == {
        "Effect": "Allow",
        "Principal": {"Service": "pods.eks.amazonaws.com"},
        "Action": ["sts:AssumeRole", "sts:TagSession"],
        "Condition": {
            "StringEquals": {
                "aws:SourceAccount": ACCOUNT,
                "aws:RequestTag/eks-cluster-name": "medloop",
                "aws:RequestTag/kubernetes-namespace": namespace,
                "aws:RequestTag/kubernetes-service-account": name,
            }
        },
    }
    assert [made for kind, made in cloud.recorded if made.get("ServiceAccount") == name] == [
        {
            "ClusterName": "medloop",
            "Namespace": namespace,
            "ServiceAccount": name,
            "RoleArn": f"arn:aws:iam::{ACCOUNT}:role/medloop-{name}",
        }
    ]


@pytest.mark.parametrize(("role", "environment"), [("publisher", "images"), ("deployer", "production")])
def test_a_workflow_is_let_in_from_its_repository_and_environment_alone(
    cloud: "Cloud", role: str, environment: str
) -> None:
    provider = f"arn:aws:iam::{ACCOUNT}:oidc-provider/token.actions.githubusercontent.com"
    known = cloud.client("iam").get_open_id_connect_provider(OpenIDConnectProviderArn=provider)
    assert known["ClientIDList"] == ["sts.amazonaws.com"]
    assert trust(cloud, f"medloop-github-{role}") == {
        "Effect": "Allow",
        "Principal": {"Federated": provider},
        "Action": "sts:AssumeRoleWithWebIdentity",
        "Condition": {
            "StringEquals": {
                "token.actions.githubusercontent.com:aud": "sts.amazonaws.com",
                "token.actions.githubusercontent.com:sub": f"repo:hospital/medloop:environment:{environment}",
            }
        },
    }


@pytest.mark.parametrize(
    ("repository", "right"),
    [
        ("hospital/medloop", True),
        ("hospital@1234/medloop@5678", True),  # the subject of newer repositories
        ("hospital/*", False),
        ("hospital/medloop:ref:refs/heads/x", False),
        ("hospital", False),
    ],
)
def test_a_repository_is_one_repository(repository: str, right: bool) -> None:
    template = (Path(__file__).parents[3] / "infra" / "aws" / "github.yaml").read_text()
    [pattern] = re.findall(r'^  Repository:\n    Type: String\n    AllowedPattern: "(.*)"$', template, re.MULTILINE)
    assert bool(re.fullmatch(pattern, repository)) is right


def test_the_publisher_pushes_images_and_the_deployer_finds_the_cluster(cloud: "Cloud") -> None:
    login, push = policies(cloud)["medloop-github-publisher"]
    assert login["Action"] == "ecr:GetAuthorizationToken"
    repositories = f"arn:aws:ecr:{REGION}:{ACCOUNT}:repository"
    assert set(push["Resource"]) == {f"{repositories}/medloop-{image}" for image in IMAGES}
    assert not [action for action in push["Action"] if "Delete" in action or "Policy" in action]
    [find] = policies(cloud)["medloop-github-deployer"]
    assert (find["Action"], find["Resource"]) == (
        "eks:DescribeCluster",
        f"arn:aws:eks:{REGION}:{ACCOUNT}:cluster/medloop",
    )


def test_inside_the_cluster_the_deployer_is_a_group_and_nothing_else(cloud: "Cloud") -> None:
    assert [made for kind, made in cloud.recorded if kind == "AWS::EKS::AccessEntry"] == [
        {
            "ClusterName": "medloop",
            "PrincipalArn": f"arn:aws:iam::{ACCOUNT}:role/medloop-github-deployer",
            "Type": "STANDARD",
            "KubernetesGroups": ["medloop-deployer"],
        }
    ]
