"""`setup`: what services rely on and do not make themselves. Run again it changes nothing, so a stack may run it at
every start."""

import os
from pathlib import Path
from typing import Any

import typer
from rich.text import Text

from medloop.approvals import PUBLIC_KEY_FILE, Signer
from medloop.auth.keys import ApiKeys
from medloop.auth.principal import ACT_AS
from medloop.cli.context import Context
from medloop.cli.output import Json, console, show
from medloop.clients import ClientSettings
from medloop.errors import Conflict
from medloop.settings import HomeSettings, check_placeholders
from medloop.storage.disk import disk_errors

DASHBOARD = "dashboard"
DASHBOARD_SCOPES = ("predict", "correct", "explain", "evaluate", "approve", ACT_AS)
TRUSTED = "trusted"
"""Under the folder of keys: the public ones alone, to be shared with who verifies."""


def register(app: typer.Typer) -> None:
    app.command()(setup)


def setup(as_json: Json = False) -> None:
    """Make what services rely on: the bucket, the key that signs approvals, and the dashboard's API key.

    The signing key lies under MEDLOOP_HOME, its public half in keys/trusted too. The dashboard's key is the one in
    MEDLOOP_API_KEY; without it none is made. One that was revoked or replaced stays so: the dashboard is then without
    access, which holds nothing else up.
    """
    check_placeholders(os.environ)
    context = Context()
    made: dict[str, Any] = {"objects": context.objects.url, "bucket": _make_bucket(context)}
    made["key_id"] = publish_key(HomeSettings().keys_dir)
    given = ClientSettings().api_key
    if given is not None and (text := given.get_secret_value().strip()):
        try:
            made["dashboard"] = ApiKeys(context.records).adopt(text, DASHBOARD, DASHBOARD_SCOPES).id
        except Conflict as refused:
            made["dashboard"], made["refused"] = None, refused.detail
            console.print(Text(f"The dashboard has no access: {refused.detail}"))
    show(made, as_json, f"Ready: {made['objects']}; approvals are signed with key {made['key_id']}.")


def publish_key(folder: Path) -> str:
    """Make the signing key in `folder` if there is none, and put its public half into `folder`/trusted; its id."""
    signer = Signer.open(folder)
    trusted = folder / TRUSTED
    with disk_errors(trusted):
        public, shared = (folder / PUBLIC_KEY_FILE).read_bytes(), trusted / PUBLIC_KEY_FILE
        trusted.mkdir(mode=0o700, exist_ok=True)
        if not shared.exists() or shared.read_bytes() != public:  # who reads it meanwhile finds it whole
            shared.write_bytes(public)
    return signer.key_id


def _make_bucket(context: Context) -> bool:
    from medloop.storage.s3 import S3Objects  # half a second of boto3, where there is S3

    return isinstance(context.objects, S3Objects) and context.objects.make_bucket()
