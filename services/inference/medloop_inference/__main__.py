"""`python -m medloop_inference`: serve until SIGINT or SIGTERM."""

import logging
import os
import sys

from medloop.http import run

from medloop_inference.app import create_app
from medloop_inference.settings import Settings


def main() -> int:
    # Logs are JSON lines; MLflow would draw a bar among them for each download.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # The watcher says once that MLflow does not answer; urllib3 would say it at every poll.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    return run("inference", Settings, create_app)


if __name__ == "__main__":
    sys.exit(main())
