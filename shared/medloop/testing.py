"""Small real things to test against: a network with known answers, a client that runs `lifespan`, a free port."""

import asyncio
import json
import resource
import shutil
import socket
import threading
import time
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fastapi import FastAPI
from numpy.typing import NDArray

from medloop.bundle import GOLDEN, MODEL, REFERENCE, Bundle, Card, Conformal, Golden, write_card
from medloop.engines import Network, open_network
from medloop.errors import NotFound
from medloop.outliers import Geometry, OutlierModel
from medloop.registry import BUNDLE_PATH, TAG_DATASET, TAG_DIGEST, Registry, State, Version
from medloop.vision.golden import awkward_images
from medloop.vision.prepare import PreparationSpec, prepare

TINY_CLASSES = ("dark", "bright")


def tiny_bundle(
    folder: Path,
    *,
    classes: tuple[str, ...] = TINY_CLASSES,
    size: int = 16,
    bias: float = 0.0,
    model: str = "tiny",
    dataset_id: str = "0" * 64,
    run_id: str = "0" * 32,
    threshold: float = 0.95,
    outlier_threshold: float | None = None,
) -> Bundle:
    """A bundle made without torch whose answers are known in closed form (see `tiny_probabilities`, `tiny_outlier`).

    `bias` tells versions apart; the preparation is grey, squashed to `size` pixels. Beyond `outlier_threshold`, in
    [0, 1], an image is unlike the training images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spec = PreparationSpec(mode="L", size=size)
    (folder / MODEL).write_bytes(_tiny_onnx(size, len(classes), bias))
    encoded = awkward_images(size)
    pixels = np.stack([prepare(data, spec) for data in encoded])
    rows = np.random.default_rng(0).integers(0, 256, (4, size, size, 1), dtype=np.uint8)
    prepared = np.concatenate([pixels, rows])
    probabilities = np.stack([tiny_probabilities(image, len(classes), bias) for image in prepared])
    Golden(encoded, pixels, prepared, probabilities.astype(np.float32)).save(folder / GOLDEN)
    np.savez(
        folder / REFERENCE,
        allow_pickle=False,
        embeddings=np.zeros((len(classes), 1), np.float16),
        labels=np.arange(len(classes)),
        hashes=np.zeros((len(classes), 32), np.uint8),
        **_tiny_outliers(outlier_threshold).to_arrays(),
    )
    card = Card(
        model=model,
        classes=classes,
        preparation=spec,
        architecture="tiny",
        temperature=1.0,
        conformal=Conformal(coverage=0.95, threshold=threshold, images=100),
        operating_thresholds={},
        dataset_id=dataset_id,
        run_id=run_id,
        git_commit=None,
        seed=0,
        packages={},
    )
    return write_card(folder, card)


def tiny_probabilities(image: NDArray[np.uint8], classes: int = 2, bias: float = 0.0) -> NDArray[np.float64]:
    """What the tiny network says about one image uint8 [S, S, 1]: softmax(k · (8 · mean − 4) + bias · [k = 0]).

    `mean` is the mean brightness in [0, 1], so that brighter images belong to higher classes.
    """
    mean = float(image.astype(np.float64).mean()) / 255
    logits = np.arange(classes) * (8 * mean - 4)
    logits[0] += bias
    powers = np.exp(logits - logits.max())
    return np.asarray(powers / powers.sum())


def tiny_outlier(image: NDArray[np.uint8]) -> float:
    """The tiny bundle's outlier score of one image uint8 [S, S, 1], in [0, 1]: how far its mean brightness lies from
    127.5, as a share of 127.5. The training images' own scores are 0, .01, … .99, so the percentile is about 100 times
    the score."""
    return abs(float(image.astype(np.float64).mean()) / 127.5 - 1)


def _tiny_outliers(threshold: float | None) -> OutlierModel:
    one, zero = np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32)
    middle = np.float32(127.5)  # of the embedding, which is the mean brightness in [0, 255]
    geometry = Geometry(np.array([middle]), one, one / middle, zero, np.array(1, np.float32))
    return OutlierModel(geometry, np.arange(100, dtype=np.float32) / np.float32(100), threshold)


def _tiny_onnx(size: int, classes: int, bias: float) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    weights = (np.arange(classes, dtype=np.float32) * 8 / 255)[None, :]
    biases = np.arange(classes, dtype=np.float32) * -4
    biases[0] += bias
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["pixels", "axes"], ["embedding"], keepdims=0),
            helper.make_node("Gemm", ["embedding", "weights", "biases"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        ],
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", size, size, 1])],
        [
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", classes]),
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", 1]),
        ],
        [
            numpy_helper.from_array(np.array([1, 2], np.int64), "axes"),
            numpy_helper.from_array(weights, "weights"),
            numpy_helper.from_array(biases, "biases"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


def register_bundle(registry: Registry, bundle: Bundle, experiment: str = "test") -> Version:
    """Log a bundle as a run's artifact and register it, as the trainer does."""
    client = registry.client
    found = client.get_experiment_by_name(experiment)
    experiment_id = found.experiment_id if found else client.create_experiment(experiment)
    run_id = client.create_run(experiment_id).info.run_id
    client.log_artifacts(run_id, str(bundle.folder), BUNDLE_PATH)
    client.set_terminated(run_id)
    tags = {TAG_DIGEST: bundle.digest, TAG_DATASET: bundle.card.dataset_id}
    return registry.register(bundle.card.model, run_id, tags)


class FolderRegistry(Registry):
    """A registry without MLflow: bundles that lie in folders, registered by hand, and what was asked of it.

    `aliases` and `tags` are of the one model it knows; `asked` has the name of every verb that was called.
    """

    def __init__(self) -> None:
        super().__init__("memory:")
        self.aliases: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.bundles: dict[str, Bundle] = {}
        self.asked: list[str] = []

    def add(self, bundle: Bundle) -> str:
        """Register a bundle; returns its version."""
        version = str(len(self.bundles) + 1)
        self.bundles[version] = bundle
        return version

    def state(self, model: str) -> State | None:
        self.asked.append("state")
        return State(dict(self.aliases), dict(self.tags)) if self.bundles else None

    def version(self, model: str, version: str) -> Version:
        self.asked.append("version")
        if version not in self.bundles:
            raise NotFound(f"Model {model} version {version} is not in {self.tracking_uri}.")
        card = self.bundles[version].card
        tags = {TAG_DIGEST: self.bundles[version].digest, TAG_DATASET: card.dataset_id}
        return Version(model, version, card.run_id, tags)

    def download_bundle(self, version: Version, destination: Path) -> Path:
        self.asked.append("download_bundle")
        return shutil.copytree(self.bundles[version.version].folder, destination)


def tiny_network(folder: Path, **options: Any) -> Network:
    return open_network(tiny_bundle(folder, **options))


@asynccontextmanager
async def asgi_client(app: FastAPI, base_url: str = "http://127.0.0.1") -> AsyncIterator[httpx.AsyncClient]:
    """A client of `app` in this process, with its lifespan running (`httpx.ASGITransport` does not run it)."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url=base_url, timeout=60) as client,
    ):
        yield client


def free_port() -> int:
    """A loopback port that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def nearly_full(most: int) -> Iterator[None]:
    """As on a disk with room for `most` bytes: meanwhile this process can write no file beyond them, be it what a test
    runner logs to. Keep it around the one call that is to find the disk full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def live_server(app: FastAPI) -> Iterator[str]:
    """Serve `app` over real HTTP on a loopback port, in a thread; yields its address."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_config=None, lifespan="on"))
    thread = threading.Thread(target=server.run, name="live-server", daemon=True)
    thread.start()

    async def wait() -> None:
        async with httpx.AsyncClient(timeout=1) as client:
            for _ in range(600):
                try:
                    await client.get(f"http://127.0.0.1:{port}/livez")
                except httpx.TransportError:
                    await asyncio.sleep(0.05)
                else:
                    return
        raise TimeoutError(f"the server on port {port} did not start")

    try:
        asyncio.run(wait())
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)


class LoadBalancer:
    """Says whom it signed in as AWS's does: a header that it signs, and its public keys at an address, on loopback.

    `keys` are what is published, by path; `asked` are the paths that were asked for. When not `up` it answers 503.
    """

    def __init__(self) -> None:
        self.signer = "arn:aws:elasticloadbalancing:eu-central-1:111122223333:loadbalancer/app/medloop/0123456789abcdef"
        self.key_id = "00000000-0000-4000-8000-000000000001"
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.keys = {f"/{self.key_id}": public_pem(self.key)}
        self.asked: list[str] = []
        self.up = True
        self.url = ""

    def token(self, key: ec.EllipticCurvePrivateKey | None = None, sub: object = "ann", **header: object) -> str:
        """The header's value for the person `sub`; a member of `header` that is None is left out."""
        given: dict[str, object] = {"alg": "ES256", "kid": self.key_id, "signer": self.signer, "client": "medloop"}
        given |= {"iss": "https://login.example", "exp": int(time.time()) + 120, **header}
        kept = {name: value for name, value in given.items() if value is not None}
        signed = f"{_padded(json.dumps(kept).encode())}.{_padded(json.dumps({'sub': sub}).encode())}"
        numbers = decode_dss_signature((key or self.key).sign(signed.encode(), ec.ECDSA(SHA256())))
        return f"{signed}.{_padded(b''.join(number.to_bytes(32, 'big') for number in numbers))}"

    @contextmanager
    def serving(self) -> Iterator["LoadBalancer"]:
        balancer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                balancer.asked.append(self.path)
                found = balancer.keys.get(self.path)
                self.send_response((200 if found else 404) if balancer.up else 503)
                self.end_headers()
                self.wfile.write(found or b"")

            def log_message(self, *_: Any) -> None:
                return

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            self.url = f"http://127.0.0.1:{server.server_address[1]}"
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()


def public_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _padded(data: bytes) -> str:
    """Base64 for addresses with its padding, which the standard leaves out."""
    return urlsafe_b64encode(data).decode()
