"""The command line, `medloop`.

Exit statuses: 0 done; 1 unexpected error; 2 wrong usage; 3 what was given cannot be used (image, data set, request);
4 a service or store does not answer; 5 not allowed; 6 not found; 7 conflict with what is there; 8 a model failed its
checks; 9 training failed; 10 no space left; 11 a port is in use; 12 asked
too often, or overloaded; 75 training was told to stop, and can be resumed; 130 interrupted.

With `--json` a command prints one JSON object on standard output, for errors too; progress and messages go to standard
error.
"""

import sys

import typer

from medloop.cli import dataset, engines, images, keys, local, models, setup
from medloop.cli.output import run

app = typer.Typer(
    name="medloop",
    help="Train, judge, explain, approve and serve medical image classifiers. Not a medical device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
local.register(app)
dataset.register(app)
models.register(app)
images.register(app)
engines.register(app)
keys.register(app)
setup.register(app)


def main() -> None:
    """Entry point of the `medloop` command."""
    sys.exit(run(app))
