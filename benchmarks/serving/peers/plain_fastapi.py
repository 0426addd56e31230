"""What most people write first: FastAPI, an uploaded file, a torch model.

Without `--asynchronous` the endpoint is a plain `def`, as FastAPI's documentation advises for work that blocks, and
runs in its thread pool; with it the network runs in the event loop, which spares the hand-over between threads.
"""

import sys
from pathlib import Path
from typing import Annotated

import uvicorn
from fastapi import FastAPI, File, UploadFile

from benchmarks.serving.peers.net import Model, options


def create_app(folder: Path, threads: int, asynchronous: bool) -> FastAPI:
    app, model = FastAPI(), Model(folder, threads)

    def answer(data: bytes) -> dict[str, object]:
        return model.answer(model.predict([model.decode(data)])[0])

    if asynchronous:

        @app.post("/predict")
        async def predict_here(file: Annotated[UploadFile, File()]) -> dict[str, object]:
            return answer(await file.read())

    else:

        @app.post("/predict")
        def predict(file: Annotated[UploadFile, File()]) -> dict[str, object]:
            return answer(file.file.read())

    return app


def main() -> None:
    asynchronous = "--asynchronous" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--asynchronous"]
    chosen = options()
    app = create_app(chosen.model, chosen.threads, asynchronous)
    uvicorn.run(app, host="127.0.0.1", port=chosen.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
