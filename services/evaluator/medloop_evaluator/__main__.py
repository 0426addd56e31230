"""`python -m medloop_evaluator`: serve until SIGINT or SIGTERM."""

import sys

from medloop.http import run

from medloop_evaluator.app import create_app
from medloop_evaluator.settings import EvaluatorSettings


def main() -> int:
    return run("evaluator", EvaluatorSettings, create_app)


if __name__ == "__main__":
    sys.exit(main())
