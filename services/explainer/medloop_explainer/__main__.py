"""`python -m medloop_explainer`: serve until SIGINT or SIGTERM."""

import sys

from medloop.http import run

from medloop_explainer.app import create_app
from medloop_explainer.settings import ExplainerSettings


def main() -> int:
    return run("explainer", ExplainerSettings, create_app)


if __name__ == "__main__":
    sys.exit(main())
