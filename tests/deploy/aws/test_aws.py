"""What the stacks of infra/aws make: closed, encrypted, hard to lose; and one new data set version is one message."""

import json
import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from medloop.data.manifest import Manifest, Row
from medloop.storage.s3 import S3Objects

if TYPE_CHECKING:
    from tests.deploy.aws.conftest import Cloud

ACCOUNT, REGION = "123456789012", "eu-central-1"
OBJECTS = f"medloop-objects-{ACCOUNT}-{REGION}"
ARTIFACTS = f"medloop-artifacts-{ACCOUNT}-{REGION}"
TAKE_MESSAGES = Path(__file__).parents[3] / "k8s" / "components" / "event-retraining" / "take_messages.py"
BESIDE_STORAGE = ("registry", "database", "budget")
IMAGES = {"trainer", "evaluator", "explainer", "inference", "dashboard", "mlflow"}


@pytest.mark.parametrize("bucket", [OBJECTS, ARTIFACTS])
def test_buckets_are_closed_encrypted_and_keep_what_was_overwritten(cloud: "Cloud", bucket: str) -> None:
    s3, arn = cloud.client("s3"), f"arn:aws:s3:::{bucket}"
    assert set(s3.get_public_access_block(Bucket=bucket)["PublicAccessBlockConfiguration"].values()) == {True}
    assert s3.get_bucket_ownership_controls(Bucket=bucket)["OwnershipControls"] == {
        "Rules": [{"ObjectOwnership": "BucketOwnerEnforced"}]  # no access lists
    }
    [rule] = s3.get_bucket_encryption(Bucket=bucket)["ServerSideEncryptionConfiguration"]["Rules"]
    key = {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": cloud.outputs["storage"]["KeyArn"]}
    assert rule == {"ApplyServerSideEncryptionByDefault": key, "BucketKeyEnabled": True}
    assert s3.get_bucket_versioning(Bucket=bucket)["Status"] == "Enabled"
    assert cloud.bucket_policies[bucket]["Statement"] == [
        {
            "Sid": "RefusePlainHttp",
            "Effect": "Deny",
            "Principal": "*",
            "Action": "s3:*",
            "Resource": [arn, f"{arn}/*"],
            "Condition": {"Bool": {"aws:SecureTransport": "false"}},
        }
    ]


def test_only_what_can_be_made_anew_or_was_taken_over_expires(cloud: "Cloud") -> None:
    s3 = cloud.client("s3")
    rules = {
        (bucket, rule["Filter"]["Prefix"]): rule
        for bucket in (OBJECTS, ARTIFACTS)
        for rule in s3.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
        if rule["Status"] == "Enabled"
    }
    folders = ("decoded/", "incoming/", "spool/", "training/")
    assert rules.keys() == {(ARTIFACTS, ""), (OBJECTS, ""), *((OBJECTS, folder) for folder in folders)}
    expiring = {where for where, rule in rules.items() if "Days" in rule.get("Expiration", {})}
    assert expiring == {(OBJECTS, folder) for folder in folders if folder != "spool/"}
    assert {rules[where]["Expiration"]["Days"] for where in expiring} == {30}
    for (_, prefix), rule in rules.items():
        assert rule["NoncurrentVersionExpiration"]["NoncurrentDays"] == (1 if prefix else 30)
        if not prefix:  # which is for every object
            assert rule["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] == 2


def test_the_key_turns_and_is_the_accounts(cloud: "Cloud") -> None:
    kms, key = cloud.client("kms"), cloud.outputs["storage"]["KeyArn"]
    assert kms.get_key_rotation_status(KeyId=key)["KeyRotationEnabled"]
    [statement] = json.loads(kms.get_key_policy(KeyId=key, PolicyName="default")["Policy"])["Statement"]
    assert statement["Principal"] == {"AWS": f"arn:aws:iam::{ACCOUNT}:root"}


def test_one_complete_version_is_one_message(cloud: "Cloud") -> None:
    store = S3Objects(cloud.client("s3"), OBJECTS)
    rows = tuple(Row(f"{n:064x}", f"{n:064x}", "round", "train", location=f"images/{n}") for n in range(3))
    for row in rows:
        store.put_if_absent(row.location, b"an image")
    version = Manifest("phantoms", ("round",), rows)
    version.save(store)
    messages = take(cloud, "medloop-retraining")
    assert [(event["detail-type"], event["detail"]["object"]["key"]) for event in messages] == [
        ("Object Created", "lineages/phantoms/00000000.json")
    ]
    assert messages[0]["detail"]["bucket"]["name"] == OBJECTS
    assert json.loads(store.get("lineages/phantoms/00000000.json"))["id"] == version.id
    S3Objects(cloud.client("s3"), ARTIFACTS).put("lineages/phantoms/00000000.json", b"another bucket's")
    assert take(cloud, "medloop-retraining") == []


def test_a_training_takes_all_messages_first(cloud: "Cloud") -> None:
    sqs = cloud.client("sqs")
    queue = sqs.create_queue(QueueName="bell")["QueueUrl"]
    code = runpy.run_path(str(TAKE_MESSAGES))
    code["take_all"].__globals__["WAIT_SECONDS"] = 0
    for n in range(12):
        sqs.send_message(QueueUrl=queue, MessageBody=f"{n}")
    assert (code["take_all"](sqs, queue), code["take_all"](sqs, queue)) == (12, 0)
    attributes = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["All"])["Attributes"]
    counts = [number for name, number in attributes.items() if name.startswith("ApproximateNumber")]
    assert counts == ["0"] * 3, "deleted, and not only hidden for a while"


def test_both_buckets_tell_eventbridge(cloud: "Cloud") -> None:
    events, sqs = cloud.client("events"), cloud.client("sqs")
    url = sqs.create_queue(QueueName="all")["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    events.put_rule(Name="all", EventPattern='{"source": ["aws.s3"]}')
    events.put_targets(Rule="all", Targets=[{"Id": "all", "Arn": arn}])
    for bucket in (OBJECTS, ARTIFACTS):
        S3Objects(cloud.client("s3"), bucket).put("elsewhere/file", b"")
    events.remove_targets(Rule="all", Ids=["all"])
    events.delete_rule(Name="all")
    assert {event["detail"]["bucket"]["name"] for event in take(cloud, "all")} == {OBJECTS, ARTIFACTS}


def take(cloud: "Cloud", queue: str) -> list[dict[str, Any]]:
    sqs = cloud.client("sqs")
    url = sqs.get_queue_url(QueueName=queue)["QueueUrl"]
    return [
        json.loads(message["Body"])
        for message in sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10, WaitTimeSeconds=0).get("Messages", [])
    ]


def test_queues_take_from_the_rule_alone(cloud: "Cloud") -> None:
    sqs, events = cloud.client("sqs"), cloud.client("events")
    urls = [sqs.get_queue_url(QueueName=f"medloop-retraining{end}")["QueueUrl"] for end in ("", "-undelivered")]
    queue, dead = [sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"] for url in urls]
    assert json.loads(queue["RedrivePolicy"]) == {"deadLetterTargetArn": dead["QueueArn"], "maxReceiveCount": 5}
    [rule] = events.list_rules()["Rules"]
    assert rule["State"] == "ENABLED"
    [target] = events.list_targets_by_rule(Rule=rule["Name"])["Targets"]
    assert (target["Arn"], target["DeadLetterConfig"]) == (queue["QueueArn"], {"Arn": dead["QueueArn"]})
    for attributes in (queue, dead):
        assert attributes["SqsManagedSseEnabled"] == "true"
        allow, deny = json.loads(attributes["Policy"])["Statement"]
        assert (allow["Effect"], allow["Principal"]) == ("Allow", {"Service": "events.amazonaws.com"})
        assert allow["Action"] == "sqs:SendMessage"
        assert allow["Condition"] == {"ArnEquals": {"aws:SourceArn": rule["Arn"]}}
        assert deny["Effect"] == "Deny"
        assert deny["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
        for statement in (allow, deny):
            assert statement["Resource"] == [queue["QueueArn"], dead["QueueArn"]]


def test_images_are_scanned_and_tags_never_move(cloud: "Cloud") -> None:
    ecr = cloud.client("ecr")
    repositories = ecr.describe_repositories()["repositories"]
    assert {repository["repositoryName"] for repository in repositories} == {f"medloop-{image}" for image in IMAGES}
    for repository in repositories:
        assert repository["imageScanningConfiguration"] == {"scanOnPush": True}
        assert repository["imageTagMutability"] == "IMMUTABLE"
        text = ecr.get_lifecycle_policy(repositoryName=repository["repositoryName"])["lifecyclePolicyText"]
        tagged, untagged = json.loads(text)["rules"]
        assert (tagged["selection"]["tagStatus"], tagged["selection"]["countNumber"]) == ("tagged", 100)
        # Signatures have no tag.
        assert (untagged["selection"]["tagStatus"], untagged["selection"]["countNumber"]) == ("untagged", 180)


def test_the_database_is_private_encrypted_and_hard_to_lose(cloud: "Cloud") -> None:
    rds, ec2 = cloud.client("rds"), cloud.client("ec2")
    [database] = rds.describe_db_instances()["DBInstances"]
    assert database["Engine"] == "postgres"
    assert database["StorageEncrypted"]
    assert database["KmsKeyId"] == cloud.outputs["storage"]["KeyArn"]
    assert not database["PubliclyAccessible"]
    assert database["DeletionProtection"]
    assert database["BackupRetentionPeriod"] == 14
    assert database["MasterUserSecret"]["SecretArn"] == cloud.outputs["database"]["AdministratorSecret"]
    assert len(database["DBSubnetGroup"]["Subnets"]) == 2
    [options] = database["DBParameterGroups"]
    settings = rds.describe_db_parameters(DBParameterGroupName=options["DBParameterGroupName"])["Parameters"]
    assert {setting["ParameterName"]: setting["ParameterValue"] for setting in settings} == {"rds.force_ssl": "1"}
    [group] = database["VpcSecurityGroups"]
    [group] = ec2.describe_security_groups(GroupIds=[group["VpcSecurityGroupId"]])["SecurityGroups"]
    [way] = group["IpPermissions"]
    [cluster] = ec2.describe_security_groups(Filters=[{"Name": "group-name", "Values": ["cluster"]}])["SecurityGroups"]
    assert (way["IpProtocol"], way["FromPort"], way["ToPort"], way["IpRanges"]) == ("tcp", 5432, 5432, [])
    assert [pair["GroupId"] for pair in way["UserIdGroupPairs"]] == [cluster["GroupId"]]


def test_the_databases_login_is_drawn_and_fits_an_address(cloud: "Cloud") -> None:
    text = cloud.client("secretsmanager").get_secret_value(SecretId="medloop/mlflow-database")["SecretString"]
    login = json.loads(text)
    assert login.pop("password").isalnum()
    assert login == {
        "username": "mlflow",
        "host": cloud.outputs["database"]["Host"],
        "port": "5432",
        "dbname": "mlflow",
    }


def test_somebody_hears_of_the_bill(cloud: "Cloud") -> None:
    budgets = cloud.client("budgets")
    [budget] = budgets.describe_budgets(AccountId=ACCOUNT)["Budgets"]
    assert budget["BudgetLimit"] == {"Amount": "700", "Unit": "USD"}
    notifications = budgets.describe_notifications_for_budget(AccountId=ACCOUNT, BudgetName=budget["BudgetName"])
    assert {(found["NotificationType"], found["Threshold"]) for found in notifications["Notifications"]} == {
        ("ACTUAL", 80.0),
        ("FORECASTED", 100.0),
    }
