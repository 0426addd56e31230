import os
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import medloop.registry
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from medloop.bundle import read_bundle
from medloop.errors import NotFound, TrackingUnavailable, UntrustedModel
from medloop.registry import (
    CHAMPION,
    NEWEST_BUNDLES,
    TAG_DIGEST,
    UNUSED_S,
    BundleCache,
    Registry,
    State,
    fetch_bundle,
)
from medloop.testing import free_port, live_server, register_bundle, tiny_bundle


def test_a_registered_bundle_comes_back_whole(registry: Registry, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "made")
    version = register_bundle(registry, bundle)
    downloaded = registry.download_bundle(version, tmp_path / "fetched")
    assert read_bundle(downloaded).digest == bundle.digest == version.tags[TAG_DIGEST]


def test_a_fetched_bundle_is_kept_and_verified_each_time(registry: Registry, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "made")
    version = register_bundle(registry, bundle)
    kept = fetch_bundle(registry, version, tmp_path / "kept")
    assert kept.folder == tmp_path / "kept" / bundle.digest
    registered = next(tmp_path.glob("mlruns/**/bundle/model.onnx"))
    good = registered.read_bytes()
    registered.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert fetch_bundle(registry, version, tmp_path / "kept").digest == bundle.digest  # from this disk
    with pytest.raises(UntrustedModel, match=r"model\.onnx"):
        fetch_bundle(registry, version, tmp_path / "kept", fresh=True)
    registered.write_bytes(good)
    (kept.folder / "model.onnx").write_bytes(b"damaged")
    assert (fetch_bundle(registry, version, tmp_path / "kept").folder / "model.onnx").read_bytes() == good
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [bundle.digest]


def test_bundles_that_nobody_used_for_a_week_go_but_for_the_newest(registry: Registry, tmp_path: Path) -> None:
    cache = BundleCache(tmp_path / "kept")
    bundles = [tiny_bundle(tmp_path / str(number), bias=number) for number in range(NEWEST_BUNDLES + 4)]
    digests = [bundle.digest for bundle in bundles]
    for age, bundle in enumerate(bundles):  # the first was used last
        used = time.time() - UNUSED_S - 60 * age
        os.utime(shutil.copytree(bundle.folder, tmp_path / "kept" / bundle.digest), (used, used))
    (tmp_path / "kept" / "notes").mkdir()
    os.utime(tmp_path / "kept" / "notes", (0, 0))
    assert cache.find(digests[-1]) is not None  # used now
    cache.touch([digests[-2], "0" * 64])
    cache.evict()
    stay = {*digests[: NEWEST_BUNDLES - 2], *digests[-2:]}
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {*stay, "notes"}
    assert all(cache.find(digest) is not None for digest in stay)
    assert cache.find(digests[-3]) is None
    recent = time.time() - UNUSED_S + 60
    shutil.copytree(bundles[-3].folder, tmp_path / "kept" / digests[-3])
    for path in (tmp_path / "kept").iterdir():
        os.utime(path, (recent, recent))
    cache.evict()
    assert len(list((tmp_path / "kept").iterdir())) == NEWEST_BUNDLES + 2


def test_another_bundle_than_the_registered_one_is_not_fetched(registry: Registry, tmp_path: Path) -> None:
    register_bundle(registry, tiny_bundle(tmp_path / "made"))
    registry.set_tag("tiny", "1", TAG_DIGEST, "0" * 64)
    with pytest.raises(UntrustedModel, match="not the expected one"):
        fetch_bundle(registry, registry.version("tiny", "1"), tmp_path / "kept")
    assert list((tmp_path / "kept").iterdir()) == []


def test_versions_count_up_and_show_their_aliases(registry: Registry, tmp_path: Path) -> None:
    for number in range(2):
        register_bundle(registry, tiny_bundle(tmp_path / str(number), bias=number))
    registry.set_alias("tiny", CHAMPION, "1")
    registry.set_model_tag("tiny", "note", "x")
    assert [(v.version, v.aliases) for v in registry.versions("tiny")] == [("2", ()), ("1", (CHAMPION,))]
    state = registry.state("tiny")
    assert state is not None
    assert (state.aliases, state.tags) == ({CHAMPION: "1"}, {"note": "x"})
    found = registry.at_alias("tiny", CHAMPION)
    assert found is not None
    assert found.version == "1"
    registry.delete_alias("tiny", CHAMPION)
    assert registry.at_alias("tiny", CHAMPION) is None
    assert registry.models() == ["tiny"]


def test_what_is_not_there_is_not_found(registry: Registry) -> None:
    assert registry.at_alias("nothing", CHAMPION) is None
    assert registry.state("nothing") is None
    with pytest.raises(NotFound, match="nothing version 1"):
        registry.version("nothing", "1")
    with pytest.raises(NotFound):
        registry.versions("nothing")


def test_an_unreachable_mlflow_says_where_it_was_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    url = f"http://user:secret@127.0.0.1:{free_port()}"
    with pytest.raises(TrackingUnavailable, match=r"does not answer at http://127\.0\.0\.1") as caught:
        Registry(url).ping()
    assert "secret" not in str(caught.value)


def test_an_mlflow_that_accepts_and_never_answers_is_noticed_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(medloop.registry, "LOOK_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        registry = Registry(f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(TrackingUnavailable, match="does not answer"):
            registry.state("tiny")
    assert 0.3 <= time.monotonic() - started < 60  # MLflow's own patience is two minutes


def test_aliases_and_tags_are_read_from_a_server_s_rest_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "mine")
    asked: list[str] = []
    app = FastAPI()

    @app.get("/prefix/api/2.0/mlflow/registered-models/get")
    def get(name: str, request: Request) -> JSONResponse:
        asked.append(request.headers["authorization"])
        if name == "missing":
            return JSONResponse({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "No such model"}, 404)
        model: dict[str, Any] = {"name": name}  # as MLflow answers: what is empty is left out
        if name == "full":
            model |= {"aliases": [{"alias": CHAMPION, "version": "3"}], "tags": [{"key": "note", "value": "x"}]}
        return JSONResponse({"registered_model": model})

    with live_server(app) as address:
        registry = Registry(f"{address}/prefix")
        assert registry.state("full") == State({CHAMPION: "3"}, {"note": "x"})
        assert registry.state("bare") == State({}, {})
        assert registry.state("missing") is None
    assert asked == ["Bearer mine"] * 3


@pytest.mark.parametrize("digest", ["../objects", "", ".", "A" * 64])
def test_a_tag_cannot_lead_out_of_the_folder_of_bundles(registry: Registry, tmp_path: Path, digest: str) -> None:
    (tmp_path / "objects").mkdir()
    version = register_bundle(registry, tiny_bundle(tmp_path / "made"))
    tampered = replace(version, tags={**version.tags, TAG_DIGEST: digest})
    with pytest.raises(UntrustedModel, match="digest"):
        fetch_bundle(registry, tampered, tmp_path / "kept")
    assert (tmp_path / "objects").is_dir()
