"""LitServe with batching and its fast queue, which its documentation advises above 100 requests a second.

Images come as base64 in JSON, as in its own guide to batching: between its two processes a request is pickled, which
an uploaded file cannot be.
"""

import base64
from pathlib import Path
from typing import Any

import litserve
from torch import Tensor

from benchmarks.serving.peers.net import BATCH, BATCH_WAIT_S, Model, options


class Classifier(litserve.LitAPI):
    def __init__(self, folder: Path, threads: int) -> None:
        super().__init__(max_batch_size=BATCH, batch_timeout=BATCH_WAIT_S)
        self._folder, self._threads = folder, threads

    def setup(self, device: str) -> None:
        self._net = Model(self._folder, self._threads)

    def decode_request(self, request: dict[str, str]) -> Tensor:
        return self._net.decode(base64.b64decode(request["image_data"]))

    def batch(self, inputs: list[Tensor]) -> list[Tensor]:
        return inputs

    def predict(self, x: list[Tensor]) -> list[list[float]]:
        return self._net.predict(x)

    def unbatch(self, output: list[list[float]]) -> list[list[float]]:
        return output

    def encode_response(self, output: list[float]) -> dict[str, Any]:
        return self._net.answer(output)


def main() -> None:
    chosen = options()
    api = Classifier(chosen.model, chosen.threads)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(host="127.0.0.1", port=chosen.port, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
