"""The stacks of infra/aws, made in moto.

moto's CloudFormation reads the templates: parameters, conditions, references. Queues, event rules, security groups
and the database's groups it makes by itself. What it would leave out, wholly or in part, is made here through
the API that CloudFormation would call, with the template's properties; `RECORDED` are those that moto has no API for.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import mock_aws
from moto.cloudformation import parsing
from moto.core.common_models import CloudFormationModel

STACKS = Path(__file__).parents[3] / "infra" / "aws"
ACCOUNT, REGION = "123456789012", "eu-central-1"
Properties = dict[str, Any]
Make = Callable[[str, Properties], tuple[str, dict[str, str]]]
"""From a name and the properties to what Ref gives, and GetAtt."""

_MARKER = "ExpiredObjectDeleteMarker"
RECORDED = ("AWS::EKS::PodIdentityAssociation", "AWS::EKS::AccessEntry")


@dataclass
class Cloud:
    """What was deployed. The policies are taken off the buckets once read: moto heeds no condition in them, and would
    refuse everybody everything."""

    outputs: dict[str, dict[str, str]] = field(default_factory=dict)
    bucket_policies: dict[str, Properties] = field(default_factory=dict)
    recorded: list[tuple[str, Properties]] = field(default_factory=list)
    clients: dict[str, Any] = field(default_factory=dict)

    def client(self, service: str) -> Any:
        if service not in self.clients:  # a tenth of a second each
            make: Callable[..., Any] = boto3.client  # whose overloads want the service spelt out
            self.clients[service] = make(service, region_name=REGION)
        return self.clients[service]

    def deploy(self, stack: str, **parameters: str) -> None:
        """Deploy infra/aws/STACK.yaml."""
        cloudformation = self.client("cloudformation")
        cloudformation.create_stack(
            StackName=stack,
            TemplateBody=(STACKS / f"{stack}.yaml").read_text(),
            Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()],
            Capabilities=["CAPABILITY_NAMED_IAM"],
        )
        made = cloudformation.describe_stacks(StackName=stack)["Stacks"][0]
        assert made["StackStatus"] == "CREATE_COMPLETE"
        self.outputs[stack] = {output["OutputKey"]: output["OutputValue"] for output in made.get("Outputs", [])}


@pytest.fixture(scope="module")
def cloud(request: pytest.FixtureRequest) -> Iterator[Cloud]:
    with pytest.MonkeyPatch.context() as environment, mock_aws():
        for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            environment.delenv(name, raising=False)
        environment.setenv("AWS_DEFAULT_REGION", REGION)
        cloud = Cloud()
        _teach_moto(cloud)
        network = _network(cloud)
        cloud.deploy("storage")
        storage = {key: cloud.outputs["storage"][key] for key in ("ObjectsBucket", "ArtifactsBucket", "KeyArn")}
        parameters = {
            "registry": {},
            "database": {"KeyArn": storage["KeyArn"], **network},
            "access": storage,
            "github": {"Repository": "hospital/medloop"},
            "budget": {"MonthlyDollars": "700", "Email": "owner@example.com"},
        }
        for stack in request.module.BESIDE_STORAGE:
            cloud.deploy(stack, **parameters[stack])
        yield cloud


def _network(cloud: Cloud) -> dict[str, str]:
    """What eksctl would have made."""
    ec2 = cloud.client("ec2")
    vpc = ec2.create_vpc(CidrBlock="192.168.0.0/16")["Vpc"]["VpcId"]
    subnets = [
        ec2.create_subnet(VpcId=vpc, CidrBlock=block, AvailabilityZone=f"{REGION}{zone}")["Subnet"]["SubnetId"]
        for zone, block in (("a", "192.168.96.0/19"), ("b", "192.168.128.0/19"))
    ]
    group = ec2.create_security_group(GroupName="cluster", Description="cluster", VpcId=vpc)["GroupId"]
    return {"VpcId": vpc, "PrivateSubnetIds": ",".join(subnets), "ClusterSecurityGroupId": group}


def _teach_moto(cloud: Cloud) -> None:
    def record(kind: str) -> Make:
        def make(name: str, properties: Properties) -> tuple[str, dict[str, str]]:
            cloud.recorded.append((kind, properties))
            return name, {}

        return make

    makers: dict[str, Make] = {
        "AWS::KMS::Key": lambda name, properties: _key(cloud, properties),
        "AWS::S3::Bucket": lambda name, properties: _bucket(cloud, properties),
        "AWS::S3::BucketPolicy": lambda name, properties: _bucket_policy(cloud, name, properties),
        "AWS::SQS::QueuePolicy": lambda name, properties: _queue_policy(cloud, name, properties),
        "AWS::ECR::Repository": lambda name, properties: _repository(cloud, properties),
        "AWS::RDS::DBInstance": lambda name, properties: _database(cloud, properties),
        "AWS::SecretsManager::Secret": lambda name, properties: _secret(cloud, properties),
        "AWS::IAM::Role": lambda name, properties: _role(cloud, properties),
        "AWS::IAM::OIDCProvider": lambda name, properties: _provider(cloud, properties),
        "AWS::Budgets::Budget": lambda name, properties: _budget(cloud, name, properties),
    }
    for kind in RECORDED:
        makers[kind] = record(kind)
    for kind, make in makers.items():
        _teach(kind, make)
    for cache in (parsing.get_model_list, parsing.get_model_map, parsing.get_name_type_map):
        cache.cache_clear()


def _teach(kind: str, make: Make) -> None:
    class Resource(CloudFormationModel):
        __module__ = "moto.cloudformation.taught"  # moto keeps its models by the second word

        def __init__(self, reference: str, attributes: dict[str, str]) -> None:
            self.physical_resource_id = reference
            self._attributes = attributes

        @staticmethod
        def cloudformation_name_type() -> str:
            return ""

        @staticmethod
        def cloudformation_type() -> str:
            return kind

        @classmethod
        def has_cfn_attr(cls, attr: str) -> bool:
            return True

        def get_cfn_attribute(self, attribute: str) -> str:
            return self._attributes[attribute]

        @classmethod
        def create_from_cloudformation_json(
            cls, resource_name: str, cloudformation_json: Any, *_: Any, **__: Any
        ) -> Any:
            return cls(*make(resource_name, dict(cloudformation_json["Properties"])))

    _TAUGHT.append(Resource)  # moto knows the classes that live


_TAUGHT: list[object] = []


def _key(cloud: Cloud, properties: Properties) -> tuple[str, dict[str, str]]:
    kms = cloud.client("kms")
    policy = json.dumps(properties["KeyPolicy"])
    made = kms.create_key(Description=properties["Description"], Policy=policy)["KeyMetadata"]
    if properties["EnableKeyRotation"]:
        kms.enable_key_rotation(KeyId=made["KeyId"])
    return made["KeyId"], {"Arn": made["Arn"]}


def _bucket(cloud: Cloud, properties: Properties) -> tuple[str, dict[str, str]]:
    s3, name = cloud.client("s3"), properties.pop("BucketName")
    s3.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": REGION})
    encryption = properties.pop("BucketEncryption")["ServerSideEncryptionConfiguration"]
    for rule in encryption:
        rule["ApplyServerSideEncryptionByDefault"] = rule.pop("ServerSideEncryptionByDefault")
    s3.put_bucket_encryption(Bucket=name, ServerSideEncryptionConfiguration={"Rules": encryption})
    s3.put_bucket_versioning(Bucket=name, VersioningConfiguration=properties.pop("VersioningConfiguration"))
    s3.put_public_access_block(
        Bucket=name, PublicAccessBlockConfiguration=properties.pop("PublicAccessBlockConfiguration")
    )
    s3.put_bucket_ownership_controls(Bucket=name, OwnershipControls=properties.pop("OwnershipControls"))
    rules = [_lifecycle_rule(rule) for rule in properties.pop("LifecycleConfiguration")["Rules"]]
    s3.put_bucket_lifecycle_configuration(Bucket=name, LifecycleConfiguration={"Rules": rules})
    events = properties.pop("NotificationConfiguration")
    if events == {"EventBridgeConfiguration": {"EventBridgeEnabled": True}}:
        s3.put_bucket_notification_configuration(
            Bucket=name, NotificationConfiguration={"EventBridgeConfiguration": {}}
        )
    assert not properties, f"make these too: {properties}"
    return name, {"Arn": f"arn:aws:s3:::{name}"}


def _lifecycle_rule(rule: Properties) -> Properties:
    """From CloudFormation's words to those of S3."""
    made = {"ID": rule.pop("Id"), "Status": rule.pop("Status"), "Filter": {"Prefix": rule.pop("Prefix", "")}}
    expiration = {"Days": rule.pop("ExpirationInDays", None), _MARKER: rule.pop(_MARKER, None)}
    if found := {key: value for key, value in expiration.items() if value is not None}:
        made["Expiration"] = found
    days = int(rule.pop("NoncurrentVersionExpiration")["NoncurrentDays"])
    made["NoncurrentVersionExpiration"] = {"NoncurrentDays": days}
    return made | rule


def _bucket_policy(cloud: Cloud, name: str, properties: Properties) -> tuple[str, dict[str, str]]:
    s3, bucket = cloud.client("s3"), properties["Bucket"]
    s3.put_bucket_policy(Bucket=bucket, Policy=json.dumps(properties["PolicyDocument"]))
    cloud.bucket_policies[bucket] = json.loads(s3.get_bucket_policy(Bucket=bucket)["Policy"])
    s3.delete_bucket_policy(Bucket=bucket)
    return name, {}


def _queue_policy(cloud: Cloud, name: str, properties: Properties) -> tuple[str, dict[str, str]]:
    for queue in properties["Queues"]:
        policy = json.dumps(properties["PolicyDocument"])
        cloud.client("sqs").set_queue_attributes(QueueUrl=queue, Attributes={"Policy": policy})
    return name, {}


def _repository(cloud: Cloud, properties: Properties) -> tuple[str, dict[str, str]]:
    ecr, name = cloud.client("ecr"), properties["RepositoryName"]
    scan = {"scanOnPush": properties["ImageScanningConfiguration"]["ScanOnPush"]}
    ecr.create_repository(
        repositoryName=name, imageScanningConfiguration=scan, imageTagMutability=properties["ImageTagMutability"]
    )
    text = properties["LifecyclePolicy"]["LifecyclePolicyText"]
    ecr.put_lifecycle_policy(repositoryName=name, lifecyclePolicyText=text)
    return name, {}


def _database(cloud: Cloud, properties: Properties) -> tuple[str, dict[str, str]]:
    rds = cloud.client("rds")
    properties["VpcSecurityGroupIds"] = properties.pop("VPCSecurityGroups")
    for key in ("AllocatedStorage", "MaxAllocatedStorage", "Port", "BackupRetentionPeriod"):
        properties[key] = int(properties[key])
    for key in ("DBSubnetGroupName", "DBParameterGroupName"):
        properties[key] = properties[key].name  # Ref gives moto's own object
    properties["MultiAZ"] = properties["MultiAZ"] == "true"
    made = rds.create_db_instance(**properties)["DBInstance"]
    [made] = rds.describe_db_instances(DBInstanceIdentifier=made["DBInstanceIdentifier"])["DBInstances"]
    address = made["Endpoint"]["Address"]
    # moto's Fn::Sub looks at the first word of an attribute only.
    attributes = {"Endpoint": address, "Endpoint.Address": address}
    secret = made["MasterUserSecret"]["SecretArn"]
    return made["DBInstanceIdentifier"], attributes | {"MasterUserSecret.SecretArn": secret, "MasterUserSecret": secret}


def _secret(cloud: Cloud, properties: Properties) -> tuple[str, dict[str, str]]:
    manager, wanted = cloud.client("secretsmanager"), properties["GenerateSecretString"]
    drawn = manager.get_random_password(
        PasswordLength=wanted["PasswordLength"], ExcludePunctuation=wanted["ExcludePunctuation"]
    )["RandomPassword"]
    text = json.loads(wanted["SecretStringTemplate"]) | {wanted["GenerateStringKey"]: drawn}
    return manager.create_secret(Name=properties["Name"], SecretString=json.dumps(text))["ARN"], {}


def _role(cloud: Cloud, properties: Properties) -> tuple[str, dict[str, str]]:
    iam, name = cloud.client("iam"), properties.pop("RoleName")
    policies = properties.pop("Policies")
    properties["AssumeRolePolicyDocument"] = json.dumps(properties["AssumeRolePolicyDocument"])
    arn = iam.create_role(RoleName=name, **properties)["Role"]["Arn"]
    for policy in policies:
        iam.put_role_policy(
            RoleName=name, PolicyName=policy["PolicyName"], PolicyDocument=json.dumps(policy["PolicyDocument"])
        )
    return name, {"Arn": arn}


def _provider(cloud: Cloud, properties: Properties) -> tuple[str, dict[str, str]]:
    made = cloud.client("iam").create_open_id_connect_provider(
        Url=properties["Url"], ClientIDList=properties["ClientIdList"]
    )
    arn = made["OpenIDConnectProviderArn"]
    return arn, {"Arn": arn}


def _budget(cloud: Cloud, name: str, properties: Properties) -> tuple[str, dict[str, str]]:
    limit = properties["Budget"]["BudgetLimit"]
    limit["Amount"] = str(limit["Amount"])
    cloud.client("budgets").create_budget(AccountId=ACCOUNT, **properties)
    return name, {}
