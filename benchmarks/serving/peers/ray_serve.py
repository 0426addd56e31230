"""Ray Serve: one replica with dynamic batching, optimised for throughput as its documentation says.

Without HAProxy and direct ingress, which it would also advise: both listen on every interface of the machine.
"""

import os
import signal
from pathlib import Path
from typing import Any

# Before Ray is imported, which reads them then.
os.environ |= {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}

import ray
from ray import serve
from starlette.requests import Request

from benchmarks.serving.peers.net import BATCH, BATCH_WAIT_S, Model, options


class Classifier:
    def __init__(self, folder: str, threads: int) -> None:
        self._net = Model(Path(folder), threads)

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=BATCH_WAIT_S)
    async def predict(self, images: list[bytes]) -> list[dict[str, Any]]:
        found = self._net.predict([self._net.decode(image) for image in images])
        return [self._net.answer(probabilities) for probabilities in found]

    async def __call__(self, request: Request) -> dict[str, Any]:
        answer: dict[str, Any] = await self.predict(await request.body())
        return answer


def main() -> None:
    chosen = options()
    stop = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)
    ray.init(
        num_cpus=chosen.threads, include_dashboard=False, _node_ip_address="127.0.0.1", _temp_dir=str(chosen.scratch)
    )
    deployment = serve.deployment(Classifier).options(
        max_ongoing_requests=4 * BATCH, ray_actor_options={"num_cpus": chosen.threads}
    )
    serve.start(http_options={"host": "127.0.0.1", "port": chosen.port})
    serve.run(deployment.bind(str(chosen.model), chosen.threads), route_prefix="/predict")
    signal.sigwait(stop)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
