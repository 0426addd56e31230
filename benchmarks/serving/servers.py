"""How each server is started, asked and understood."""

import base64
import json
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medloop.engines.checks import MAX_DIFFERENCE

from benchmarks.serving.process import ROOT
from benchmarks.serving.wire import multipart, request_bytes

OURS = "medloop"
LOWER = "medloop_bfloat16"
"""Ours again, in the precision and on the engine that `LOWER_ENGINE` names."""
LOWER_ENGINE = ("openvino", "bfloat16")


@dataclass(frozen=True, slots=True)
class Kind:
    """A server. `request` makes the bytes that go over the wire for (image file, media type); `probabilities` finds
    the K classes' in the body of an answer, in the order of the model's card."""

    name: str
    environment: str
    """The folder of the interpreter's virtual environment; empty for the one that this runs in."""
    command: Callable[["Place"], Sequence[str]]
    request: Callable[[bytes, str], bytes]
    probabilities: Callable[[Any], Sequence[float]]
    variables: Callable[["Place"], Mapping[str, str]] = lambda place: {}
    max_difference: float = 1e-3
    """How far its probabilities may lie from the bare engine's before it counts as answering something else."""

    @property
    def ours(self) -> bool:
        return self.name in (OURS, LOWER)

    @property
    def installed(self) -> bool:
        return not self.environment or (ROOT / self.environment / "bin" / "python").exists()


@dataclass(frozen=True, slots=True)
class Place:
    """What a server is started with: the `model`'s folder, a `scratch` folder of its own, where our `home` is and
    MLflow answers."""

    model: Path
    scratch: Path
    port: int
    threads: int
    home: Path
    tracking_uri: str

    @property
    def options(self) -> list[str]:
        return [
            *("--model", str(self.model), "--port", str(self.port)),
            *("--threads", str(self.threads), "--scratch", str(self.scratch)),
        ]

    @property
    def registered(self) -> str:
        card = json.loads((self.model / "bundle" / "bundle.json").read_text())
        return str(card["model"])


def python(environment: str) -> str:
    return str(ROOT / environment / "bin" / "python") if environment else sys.executable


def our_variables(place: Place) -> dict[str, str]:
    return {
        "MEDLOOP_HOME": str(place.home),
        "MEDLOOP_MODEL": place.registered,
        "MEDLOOP_PORT": str(place.port),
        "MEDLOOP_ENGINE_THREADS": str(place.threads),
        # The others queue without bound: to be compared with them, so must this. `overload` sets it back.
        "MEDLOOP_TARGET_MS": "10000",
        "MEDLOOP_LOG_LEVEL": "WARNING",
        "MLFLOW_TRACKING_URI": place.tracking_uri,
    }


def our_lower_variables(place: Place) -> dict[str, str]:
    engine, precision = LOWER_ENGINE
    return our_variables(place) | {"MEDLOOP_ENGINE": engine, "MEDLOOP_PRECISION": precision}


def raw_request(path: str) -> Callable[[bytes, str], bytes]:
    return lambda image, media_type: request_bytes(path, image, media_type)


def form_request(path: str, field: str) -> Callable[[bytes, str], bytes]:
    def make(image: bytes, media_type: str) -> bytes:
        body, content_type = multipart(field, "image", image, media_type)
        return request_bytes(path, body, content_type)

    return make


def json_request(path: str, document: Callable[[str], Any]) -> Callable[[bytes, str], bytes]:
    """JSON around the image in base64, for servers that take nothing else."""

    def make(image: bytes, media_type: str) -> bytes:
        body = json.dumps(document(base64.b64encode(image).decode())).encode()
        return request_bytes(path, body, "application/json")

    return make


def _by_class(document: Any) -> list[float]:
    return list(document["probabilities"].values())


def _first_prediction(document: Any) -> list[float]:
    """MLflow's and BentoML's answers are of batches of one."""
    return _by_class(document["predictions"][0] if isinstance(document, dict) else document[0])


def _first_output(document: Any) -> list[float]:
    """Open Inference Protocol."""
    return list(document["outputs"][0]["data"])


def _infer(image: str) -> dict[str, Any]:
    tensor = {"name": "image", "shape": [1, 1], "datatype": "BYTES", "data": [image]}
    return {"inputs": [{**tensor, "parameters": {"content_type": "base64"}}]}


def _quiet(place: Place) -> dict[str, str]:
    """None of them may call home, or leave anything in the home of whoever runs this."""
    return {
        "BENTOML_DO_NOT_TRACK": "True",
        # A line in the log for each request, which nobody else here writes.
        "BENTOML_CONFIG_OPTIONS": "api_server.logging.access.enabled=false",
        "BENTOML_HOME": str(place.scratch / "bentoml"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
    }


def _peer(name: str, module: str, *more: str, environment: str = ".venv-peers", **how: Any) -> Kind:
    def command(place: Place) -> list[str]:
        return [python(environment), "-m", f"benchmarks.serving.peers.{module}", *place.options, *more]

    return Kind(name, environment, command, **{"probabilities": _by_class, "variables": _quiet, **how})


_ALL = (
    Kind(
        OURS,
        "",
        lambda place: [sys.executable, "-m", "medloop_inference"],
        raw_request("/v1/predict"),
        _by_class,
        our_variables,
    ),
    Kind(
        LOWER,
        "",
        lambda place: [sys.executable, "-m", "medloop_inference"],
        raw_request("/v1/predict"),
        _by_class,
        our_lower_variables,
        MAX_DIFFERENCE[LOWER_ENGINE[1]],
    ),
    _peer("fastapi", "plain_fastapi", request=form_request("/predict", "file")),
    _peer("fastapi_async", "plain_fastapi", "--asynchronous", request=form_request("/predict", "file")),
    _peer("litserve", "lit", request=json_request("/predict", lambda image: {"image_data": image})),
    _peer("bentoml", "bento", request=form_request("/predict", "images"), probabilities=_first_prediction),
    _peer(
        "mlflow",
        "mlflow_pyfunc",
        request=json_request("/invocations", lambda image: {"inputs": [image]}),
        probabilities=_first_prediction,
    ),
    _peer(
        "mlserver",
        "mlserver_runtime",
        environment=".venv-peers-mlserver",
        request=json_request("/v2/models/classifier/infer", _infer),
        probabilities=_first_output,
    ),
    _peer("ray", "ray_serve", request=raw_request("/predict")),
)
KINDS = {kind.name: kind for kind in _ALL}
PEERS = [kind.name for kind in _ALL if not kind.ours]
