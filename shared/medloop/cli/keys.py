"""`keys`: who may call the services. Whoever can write the records can issue keys, and nobody else."""

import re
from datetime import timedelta
from typing import Annotated

import typer

from medloop.auth.keys import ApiKey, ApiKeys
from medloop.auth.principal import SCOPES
from medloop.cli.context import Context
from medloop.cli.output import Json, console, show, table
from medloop.errors import InvalidRequest
from medloop.schemas import now

_UNITS = {"d": "days", "h": "hours", "m": "minutes", "s": "seconds"}

Key = Annotated[str, typer.Argument(help="The key's id or the name it was issued to.")]


def register(app: typer.Typer) -> None:
    keys = typer.Typer(no_args_is_help=True, help="Issue, list, rotate and revoke API keys.")
    keys.command()(issue)
    keys.command(name="list")(show_all)
    keys.command()(rotate)
    keys.command()(revoke)
    app.add_typer(keys, name="keys")


def issue(
    name: Annotated[str, typer.Option(help="Who calls with it; approvals are signed in this name.")],
    scopes: Annotated[str, typer.Option(help=f"Comma-separated, of: {', '.join(sorted(SCOPES))}.")],
    expires: Annotated[str, typer.Option(help="After how long, such as 90d or 12h; never, when left out.")] = "",
    rate: Annotated[float | None, typer.Option(help="Requests a second that it may send to one process.")] = None,
    as_json: Json = False,
) -> None:
    """Issue a key. Its text is shown once and kept nowhere."""
    wanted = [scope for part in scopes.split(",") if (scope := part.strip())]
    made = ApiKeys(Context().records).issue(name, wanted, lasts=_duration(expires), rate=rate)
    _show_text(made.key, made.text, as_json)


def show_all(as_json: Json = False) -> None:
    """List all keys there ever were, newest first."""
    found = ApiKeys(Context().records).all()
    rows = [
        (key.id, key.name, ",".join(key.scopes), _state(key), f"{key.created_at:%Y-%m-%d}", _day(key), key.rate or "")
        for key in found
    ]
    columns = ["id", "name", "scopes", "state", "issued", "expires", "rate"]
    shown = [key.model_dump(mode="json", exclude={"digests"}) | {"state": _state(key)} for key in found]
    show({"keys": shown}, as_json, table("API keys", columns, rows))


def rotate(
    key: Key,
    grace: Annotated[str, typer.Option(help="How long the old text still works, such as 1h; not at all.")] = "",
    as_json: Json = False,
) -> None:
    """Give a key another text, shown once; id, name, scopes and expiry stay."""
    made = ApiKeys(Context().records).rotate(key, _duration(grace) or timedelta())
    _show_text(made.key, made.text, as_json)


def revoke(key: Key, as_json: Json = False) -> None:
    """End a key for good; services refuse it within seconds (MEDLOOP_KEYS_SECONDS)."""
    ended = ApiKeys(Context().records).revoke(key)
    show(ended.model_dump(mode="json", exclude={"digests"}), as_json, f"Key {ended.id} of {ended.name} is revoked.")


def _show_text(key: ApiKey, text: str, as_json: bool) -> None:
    if not as_json:
        console.print(f"Key {key.id} of {key.name} ({', '.join(key.scopes)}). Store it now; it is not shown again:")
    show(key.model_dump(mode="json", exclude={"digests"}) | {"key": text}, as_json, text)


def _duration(text: str) -> timedelta | None:
    if not text:
        return None
    found = re.fullmatch(r"([1-9][0-9]{0,5})([dhms])", text)
    if found is None:
        raise InvalidRequest(f"{text!r} is no length of time; give one like 90d, 12h, 30m or 45s.")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


def _state(key: ApiKey) -> str:
    if key.status == "active" and key.expires_at is not None and now() >= key.expires_at:
        return "expired"
    return key.status


def _day(key: ApiKey) -> str:
    return f"{key.expires_at:%Y-%m-%d}" if key.expires_at else ""
