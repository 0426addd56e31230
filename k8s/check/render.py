"""From folders of manifests to documents, by `kubectl kustomize`."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import yaml  # type: ignore[import-untyped]  # ships no types

from k8s.overlays.dev import make_secrets

Document: TypeAlias = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = ("dev", "eks")
EKS_ONLY = ("event-retraining",)
"""The components that take something from that overlay which dev does not have."""
OLDEST = (1, 27)
"""The first kubectl with kustomize 5, which these files are written for. Components are there from 1.21 on."""
_SAMPLE = {  # nothing that anybody could use
    "MEDLOOP_OBJECTS_URL": "s3://bucket/prefix",
    "AWS_ACCESS_KEY_ID": "sample",
    "AWS_SECRET_ACCESS_KEY": "sample",
    "AWS_REGION": "eu-central-1",
}


class CannotCheck(Exception):
    """Nothing can be said: a tool is missing or too old, or a folder cannot be rendered."""


def find_kubectl() -> str:
    """The path of a kubectl that is new enough; raises CannotCheck, saying what to install."""
    found = shutil.which(os.environ.get("KUBECTL", "kubectl"))
    install = "install a present one (https://kubernetes.io/docs/tasks/tools/), or name it with KUBECTL=path."
    if found is None:
        raise CannotCheck(f"kubectl was not found: {install}")
    said = subprocess.run(  # noqa: S603 - the program that was asked for
        [found, "version", "--client", "--output=json"], capture_output=True, text=True, check=False
    )
    try:
        version = json.loads(said.stdout)["clientVersion"]
        number = (int(version["major"]), int(re.sub(r"\D", "", version["minor"])))
    except (ValueError, KeyError) as exc:
        raise CannotCheck(f"{found} does not tell its version: {install}") from exc
    if number < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise CannotCheck(
            f"{found} is kubectl {version['gitVersion']}, and Kustomize's Components need {wanted} or newer "
            f"(Debian's kubernetes-client is 1.20): {install}"
        )
    return found


def kustomize(kubectl: str, folder: Path) -> str:
    """The YAML that `folder` renders to; raises CannotCheck with what kubectl said."""
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        raise CannotCheck(f"{folder} cannot be rendered: {done.stderr.strip()}")
    return done.stdout


def documents(text: str) -> list[Document]:
    return [found for found in yaml.load_all(text, Loader=_Loader) if found]


# The one in C is ten times as fast, and part of nearly every installation.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@contextmanager
def copied(root: Path = ROOT) -> Iterator[Path]:
    """A copy of the manifests, with secrets for dev that were drawn for it."""
    with tempfile.TemporaryDirectory(prefix="medloop-k8s-") as name:
        copy = Path(name) / "k8s"
        leave_out = shutil.ignore_patterns("secrets", "check", "__pycache__", "make_secrets.py")
        shutil.copytree(root / "k8s", copy, ignore=leave_out)
        make_secrets.write(copy / "overlays" / "dev" / "secrets", _SAMPLE)
        yield copy


def composed(copy: Path, name: str, overlay: str, components: list[str]) -> Path:
    """A new overlay below `copy`: another one, and components on top of it."""
    folder = copy / "overlays" / name
    folder.mkdir()
    on_top = {"resources": [f"../{overlay}"], "components": [f"../../components/{each}" for each in components]}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(on_top))
    return folder


def render_all(kubectl: str, copy: Path) -> dict[str, str]:
    """By what it is: each overlay, each component on top of eks, all of them, and all but EKS_ONLY on top of dev."""
    found = [path.parent.name for path in (copy / "components").glob("*/kustomization.yaml")]
    components = sorted(found, key=lambda name: (name == "gpu", name))  # which changes what the others brought
    folders = {f"overlays/{name}": copy / "overlays" / name for name in OVERLAYS}
    folders |= {f"components/{name} on eks": composed(copy, f"eks-{name}", "eks", [name]) for name in components}
    folders["all components on eks"] = composed(copy, "on-eks", "eks", components)
    anywhere = [name for name in components if name not in EKS_ONLY]
    folders["all components on dev"] = composed(copy, "on-dev", "dev", anywhere)
    with ThreadPoolExecutor(2) as threads:
        return dict(zip(folders, threads.map(lambda folder: kustomize(kubectl, folder), folders.values()), strict=True))
