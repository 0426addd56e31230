"""MLflow: a pyfunc model, saved as code, behind `mlflow models serve`, which has no batching.

Run as a script it saves the model and becomes the server; loaded by MLflow it is the model.
"""

import base64
import os
import sys
from pathlib import Path
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import save_model
from mlflow.pyfunc.model import PythonModel

from benchmarks.serving.peers.net import Model, options

_FOLDER, _THREADS = "BENCHMARK_MODEL", "BENCHMARK_THREADS"


class Classifier(PythonModel):
    def load_context(self, context: Any) -> None:
        self._net = Model(Path(os.environ[_FOLDER]), int(os.environ[_THREADS]))

    # MLflow reads the request's schema from these annotations.
    def predict(self, model_input: list[str]) -> list[dict[str, Any]]:  # type: ignore[override]
        found = self._net.predict([self._net.decode(base64.b64decode(text)) for text in model_input])
        return [self._net.answer(probabilities) for probabilities in found]


def main() -> None:
    chosen = options()
    saved = chosen.scratch / "model"
    os.environ |= {_FOLDER: str(chosen.model), _THREADS: str(chosen.threads)}
    # MLflow starts its server through a shell, which must find this environment's uvicorn.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    save_model(saved, python_model=__file__, pip_requirements=[])
    serve = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", str(saved), "--env-manager", "local"]
    os.execv(sys.executable, [*serve, "--host", "127.0.0.1", "--port", str(chosen.port), "--workers", "1"])  # noqa: S606


if __name__ == "__main__":
    main()
else:
    set_model(Classifier())
