"""What an engine without a registry may lack beside the stores: the images that hold torch, which come from an index of
their own. The stack then runs without its explainer, and the trainer runs on this machine against the same stores."""

import json
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tests.deploy.compose.stack import Stack, docker, inspect, run

WITH_TORCH = ("explainer", "trainer")


def lacking() -> tuple[str, ...]:
    """The services of `WITH_TORCH` that this engine has no image of."""
    tag = os.environ.get("MEDLOOP_TAG", "dev")
    present = set(docker("image", "ls", "--format", "{{.Repository}}:{{.Tag}}").split())
    return tuple(name for name in WITH_TORCH if f"medloop-{name}:{tag}" not in present)


def leave_out(names: Collection[str], folder: Path) -> list[Path]:
    """The files that take services out of the stack."""
    if not names:
        return []
    lines = ["services:", *(f"  {name}: !reset null" for name in names)]
    file = folder / "left-out.yml"
    file.write_text("\n".join(lines) + "\n")
    return [file]


def train_here(stack: Stack, arguments: Sequence[str]) -> dict[str, Any]:
    """The result of `medloop_trainer` on this machine, with the stack's MLflow and S3; raises Failed."""
    networks = inspect(stack.container("s3"))["NetworkSettings"]["Networks"].values()
    address = next(one["IPAddress"] for one in networks)
    environment = {
        "MEDLOOP_HOME": str(stack.folder / "home"),
        "MEDLOOP_OBJECTS_URL": "s3://medloop/objects",
        "MLFLOW_TRACKING_URI": f"http://{stack.address(stack.container('mlflow'), 5000)}",
        "MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE": "path",
        "AWS_ENDPOINT_URL": f"http://{address}:9000",
        "AWS_ACCESS_KEY_ID": stack.secrets["S3_ACCESS_KEY"],
        "AWS_SECRET_ACCESS_KEY": stack.secrets["S3_SECRET_KEY"],
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    said = run([sys.executable, "-m", "medloop_trainer", *arguments], timeout=600, environment=environment)
    found: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
    return found
