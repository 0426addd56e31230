"""MLServer: a runtime of its own kind with adaptive batching, in the process that answers (`parallel_workers` 0).

Run as a script it writes the settings files and becomes `mlserver start`.
"""

import json
import os
import socket
import sys
from pathlib import Path

import numpy as np
from mlserver import MLModel
from mlserver.codecs import Base64Codec, NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

from benchmarks.serving.peers.net import BATCH, BATCH_WAIT_S, Model, options


class Classifier(MLModel):
    async def load(self) -> bool:
        where = self.settings.parameters
        self._net = Model(Path(where.uri), where.extra["threads"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        images = Base64Codec.decode_input(payload.inputs[0])
        found = np.array(self._net.predict([self._net.decode(image) for image in images]), np.float32)
        output = NumpyCodec.encode_output("probabilities", found)
        return InferenceResponse(model_name=self.name, outputs=[output])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def main() -> None:
    chosen = options()
    server = {
        "host": "127.0.0.1",
        "http_port": chosen.port,
        "grpc_port": _free_port(),
        "metrics_port": _free_port(),
        "parallel_workers": 0,
        "debug": False,
    }
    model = {
        "name": "classifier",
        "implementation": "benchmarks.serving.peers.mlserver_runtime.Classifier",
        "max_batch_size": BATCH,
        "max_batch_time": BATCH_WAIT_S,
        "parameters": {"uri": str(chosen.model), "extra": {"threads": chosen.threads}},
    }
    (chosen.scratch / "settings.json").write_text(json.dumps(server))
    (chosen.scratch / "model-settings.json").write_text(json.dumps(model))
    start = "from mlserver.cli import main; main()"
    os.execv(sys.executable, [sys.executable, "-c", start, "start", str(chosen.scratch)])  # noqa: S606


if __name__ == "__main__":
    main()
