"""MLflow's artifacts in S3, which every service reaches by itself: the tracking server hands on only where they lie."""

from pathlib import Path
from uuid import uuid4

import boto3
import pytest
from medloop.bundle import Bundle
from medloop.errors import StorageUnavailable, TrackingUnavailable
from medloop.registry import BUNDLE_PATH, TAG_DIGEST, Registry, Version, fetch_bundle, translated
from medloop.storage.objects import open_objects
from medloop.testing import tiny_bundle
from mlflow.store.artifact import s3_artifact_repo
from moto.core import enable_iam_authentication

KEY = "hunter2"


@pytest.fixture
def bucket(aws: None, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEY)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3_artifact_repo._cached_get_s3_client.cache_clear()  # it would go on asking another test's server
    name = f"models-{uuid4().hex}"
    boto3.client("s3").create_bucket(Bucket=name)
    return name


@pytest.fixture
def registered(registry: Registry, bucket: str, tmp_path: Path) -> tuple[Version, Bundle]:
    bundle = tiny_bundle(tmp_path / "made")
    experiment = registry.client.create_experiment("tiny", artifact_location=f"s3://{bucket}/mlflow/1")
    run_id = registry.client.create_run(experiment).info.run_id
    registry.client.log_artifacts(run_id, str(bundle.folder), BUNDLE_PATH)
    return registry.register("tiny", run_id, {TAG_DIGEST: bundle.digest}), bundle


def test_a_bundle_goes_to_the_bucket_and_comes_back(
    registry: Registry, registered: tuple[Version, Bundle], bucket: str, tmp_path: Path
) -> None:
    version, bundle = registered
    assert fetch_bundle(registry, version, tmp_path / "kept").digest == bundle.digest
    listed = boto3.client("s3").list_objects_v2(Bucket=bucket, Prefix=f"mlflow/1/{version.run_id}/artifacts/bundle/")
    assert {entry["Key"].rpartition("/")[2] for entry in listed["Contents"]} >= {"model.onnx", "bundle.json"}


def test_wrong_credentials_are_told_with_the_bucket_and_without_the_key(
    registry: Registry, registered: tuple[Version, Bundle], bucket: str, tmp_path: Path
) -> None:
    version, bundle = registered
    objects = open_objects(f"s3://{bucket}/objects")
    with enable_iam_authentication():  # moto's: it knows nobody
        for refused in (objects.ping, lambda: objects.exists("key"), lambda: objects.put("key", b"x")):
            with pytest.raises(StorageUnavailable, match=rf"^Access to s3://{bucket}/objects was denied") as caught:
                refused()
            assert KEY not in caught.value.detail
        denied = rf"^Access to MLflow's artifacts in the bucket {bucket} was denied"
        with pytest.raises(TrackingUnavailable, match=denied) as fetching:
            fetch_bundle(registry, version, tmp_path / "kept")
        with pytest.raises(TrackingUnavailable, match=denied) as logging, translated(registry.tracking_uri):
            registry.client.log_artifacts(version.run_id, str(bundle.folder), "again")
        assert KEY not in fetching.value.detail + logging.value.detail


def test_a_store_of_artifacts_that_is_away_is_no_crash(
    registry: Registry, registered: tuple[Version, Bundle], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    version, bundle = registered
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    s3_artifact_repo._cached_get_s3_client.cache_clear()
    with pytest.raises(TrackingUnavailable, match=r"artifacts in .* cannot be reached"):
        fetch_bundle(registry, version, tmp_path / "kept")
    with pytest.raises(TrackingUnavailable, match=r"artifacts in .* cannot be reached"), translated("x"):
        registry.client.log_artifacts(version.run_id, str(bundle.folder), "again")
    s3_artifact_repo._cached_get_s3_client.cache_clear()
