"""BentoML: a service with an adaptively batched API that takes uploaded images.

Run as a script it becomes `bentoml serve` of itself; the options travel in the environment, where a service that is
imported by workers finds them.
"""

import os
import sys
from pathlib import Path
from typing import Any

import bentoml
from PIL.Image import Image

from benchmarks.serving.peers.net import BATCH, Model, options

_FOLDER, _THREADS = "BENCHMARK_MODEL", "BENCHMARK_THREADS"


@bentoml.service(workers=1, http={"host": "127.0.0.1"})
class Classifier:
    def __init__(self) -> None:
        self._net = Model(Path(os.environ[_FOLDER]), int(os.environ[_THREADS]))

    @bentoml.api(batchable=True, max_batch_size=BATCH, max_latency_ms=10_000)
    def predict(self, images: list[Image]) -> list[dict[str, Any]]:
        found = self._net.predict([self._net.tensor(image) for image in images])
        return [self._net.answer(probabilities) for probabilities in found]


def main() -> None:
    chosen = options()
    os.environ |= {_FOLDER: str(chosen.model), _THREADS: str(chosen.threads)}
    serve = [sys.executable, "-m", "bentoml", "serve", "benchmarks.serving.peers.bento:Classifier"]
    os.execv(sys.executable, [*serve, "--host", "127.0.0.1", "--port", str(chosen.port)])  # noqa: S606


if __name__ == "__main__":
    main()
