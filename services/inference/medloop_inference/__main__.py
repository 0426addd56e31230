"""`python -m medloop_inference`: serve until SIGINT or SIGTERM."""

import logging
import os
import sys


def main() -> int:
    # A matrix product here takes microseconds; OpenBLAS's threads would spin far longer for it. It reads this when
    # NumPy is imported, hence what follows is imported late.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from medloop.http import run

    from medloop_inference.app import create_app
    from medloop_inference.settings import Settings

    # Logs are JSON lines; MLflow would draw a bar among them for each download.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # The watcher says once that MLflow does not answer; urllib3 would say it at every poll.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    return run("inference", Settings, create_app)


if __name__ == "__main__":
    sys.exit(main())
