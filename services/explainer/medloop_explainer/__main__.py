"""`python -m medloop_explainer`: serve until SIGINT or SIGTERM."""

import sys

from medloop.errors import InvalidRequest, MedLoopError
from medloop.http import serve
from medloop.settings import DEFAULT_PORTS
from pydantic import ValidationError

from medloop_explainer.app import create_app
from medloop_explainer.settings import ExplainerSettings


def main() -> int:
    try:
        settings = _settings()
        serve(create_app(settings), "explainer", settings.server, DEFAULT_PORTS["explainer"])
    except MedLoopError as exc:
        sys.stderr.write(f"{exc.detail}\n")
        return exc.exit_status
    return 0


def _settings() -> ExplainerSettings:
    try:
        return ExplainerSettings()
    except ValidationError as exc:
        first = exc.errors()[0]
        name = f"MEDLOOP_{first['loc'][0]}".upper()
        raise InvalidRequest(f"{name} is not set as it must be: {first['msg']}.") from exc


if __name__ == "__main__":
    sys.exit(main())
