"""What our server needs around it: an MLflow, versions in it, and approvals that are signed as the evaluator signs."""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import numpy as np
from medloop.approvals import PUBLIC_KEY_FILE, Signer
from medloop.bundle import Bundle, read_bundle
from medloop.cpus import cpu_name
from medloop.engines import open_network
from medloop.engines.checks import VERDICTS, engine_version, judge
from medloop.registry import CHAMPION, TAG_APPROVAL, Registry
from medloop.schemas import Approval, EngineVerdict
from medloop.settings import HomeSettings, StorageSettings
from medloop.storage.records import open_records
from medloop.testing import free_port, register_bundle
from medloop.vision.prepare import prepare
from medloop_evaluator.engines import compare_networks

from benchmarks.serving.process import Server


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """An MLflow server of our own on loopback; yields its address."""
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder / 'mlflow.sqlite'}"),
        *("--artifacts-destination", str(folder / "artifacts"), "--allowed-hosts", f"127.0.0.1:{port}"),
    ]
    address = f"http://127.0.0.1:{port}"
    # Its job runners import for half a minute after it is ready, on a processor that is measured by then.
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with Server(command, environment, folder / "mlflow.log") as server:
        server.wait_ready(lambda: answers(address, "/health"), interval=0.2)
        server.settle(timeout=60.0)
        yield address


def answers(address: str, path: str) -> bool:
    """Whether a GET gives 200."""
    connection = HTTPConnection(address.removeprefix("http://"), timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == HTTPStatus.OK
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


class Registrar:
    """Registers bundles, and puts signed approvals in force: what trainer and evaluator do, without a gate."""

    def __init__(self, tracking_uri: str, keys_dir: Path) -> None:
        # MLflow would tell of every run and version between the lines of the benchmark.
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
        os.environ["MLFLOW_LOGGING_LEVEL"] = "WARNING"
        self._registry = Registry(tracking_uri)
        self._keys_dir = keys_dir
        self._sequence = 0

    def register(self, bundle: Bundle) -> str:
        return register_bundle(self._registry, bundle, "benchmark").version

    def approve(self, bundle: Bundle, version: str) -> None:
        """Make `version` the champion."""
        self._sequence += 1
        model = bundle.card.model
        unsigned = Approval(
            sequence=self._sequence,
            action="approve",
            model=model,
            version=version,
            bundle_digest=bundle.digest,
            decision_id="benchmark",
            approver="benchmark",
            key_id="",
        )
        signed = Signer.open(self._keys_dir).sign(unsigned).model_dump_json()
        self._registry.set_tag(model, version, TAG_APPROVAL, signed)
        self._registry.set_model_tag(model, TAG_APPROVAL, signed)
        self._registry.set_alias(model, CHAMPION, version)


def prepare_home(home: Path, bundle_folder: Path, tracking_uri: str) -> tuple[Registrar, str]:
    """A home whose champion is the bundle; returns who signed it, and its version."""
    home.mkdir(parents=True)
    bundle = read_bundle(bundle_folder)
    registrar = Registrar(tracking_uri, HomeSettings(home=home).keys_dir)
    version = registrar.register(bundle)
    registrar.approve(bundle, version)
    return registrar, version


def check_engine(
    home: Path, bundle: Bundle, version: str, images: Sequence[bytes], engine: str, precision: str
) -> None:
    """Let `version` be served with another engine and precision if they answer `images` closely enough, as the
    evaluator would after `medloop check-engine` on the calibration split, which this model has none of."""
    pixels = np.stack([prepare(image, bundle.card.preparation) for image in images])
    networks = open_network(bundle), open_network(bundle, engine, precision)
    for network in networks:
        network.check_golden()  # inference would serve float32 instead
    check = compare_networks(*networks, iter([pixels]), len(pixels), lambda step, done, total: None)
    if (reason := judge(check)) is not None:
        raise RuntimeError(f"{precision} on {engine} does not answer closely enough to be compared: {reason}")
    verdict = EngineVerdict(
        model=bundle.card.model,
        version=version,
        bundle_digest=bundle.digest,
        dataset_id=bundle.card.dataset_id,
        engine_version=engine_version(engine),
        cpu=cpu_name(),
        check=check,
        passed=True,
    )
    records = open_records(StorageSettings(home=home).records_url)
    records.put_once(VERDICTS, verdict.id, verdict.model_dump(mode="json"))
    records.close()


def second_home(home: Path, other: Path) -> None:
    """Another machine's home, which trusts the same key."""
    keys = HomeSettings(home=other).keys_dir
    keys.mkdir(parents=True)
    shutil.copy(HomeSettings(home=home).keys_dir / PUBLIC_KEY_FILE, keys)
