"""`python -m medloop_inference`: serve until SIGINT or SIGTERM."""

import logging
import os
import sys

from medloop.errors import InvalidRequest, MedLoopError
from medloop.http import serve
from medloop.settings import DEFAULT_PORTS
from pydantic import ValidationError

from medloop_inference.app import create_app
from medloop_inference.settings import Settings


def main() -> int:
    # Logs are JSON lines; MLflow would draw a bar among them for each download.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # The watcher says once that MLflow does not answer; urllib3 would say it at every poll.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    try:
        settings = _settings()
        serve(create_app(settings), "inference", settings.server, DEFAULT_PORTS["inference"])
    except MedLoopError as exc:
        sys.stderr.write(f"{exc.detail}\n")
        return exc.exit_status
    return 0


def _settings() -> Settings:
    try:
        return Settings()
    except ValidationError as exc:
        first = exc.errors()[0]
        name = f"MEDLOOP_{first['loc'][0]}".upper()
        raise InvalidRequest(f"{name} is not set as it must be: {first['msg']}.") from exc


if __name__ == "__main__":
    sys.exit(main())
