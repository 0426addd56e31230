"""Who may talk to a service.

Without API keys or OIDC a service listens on loopback only, and answers only requests that really came for loopback:
a page in somebody's browser can reach 127.0.0.1 too, under another name (DNS rebinding) or from another origin.
"""

import ipaddress
import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal
from urllib.parse import SplitResult, urlsplit

from pydantic_settings import BaseSettings, SettingsConfigDict

from medloop.errors import Forbidden

logger = logging.getLogger(__name__)


class AuthSettings(BaseSettings):
    """`MEDLOOP_AUTH`: `loopback` (default), or `proxy` where an authenticating proxy stands in front."""

    model_config = SettingsConfigDict(env_prefix="MEDLOOP_", extra="ignore")

    auth: Literal["loopback", "proxy"] = "loopback"


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address without port, means this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_exposure(settings: AuthSettings, host: str) -> None:
    """Refuse to open a service to the network without access control."""
    if settings.auth == "proxy":
        logger.warning("MEDLOOP_AUTH=proxy: every request that arrives is trusted; keep this port behind the proxy")
    elif not is_loopback(host):
        raise Forbidden(
            f"Nothing is open by default: listening on {host} needs access control. "
            "Listen on 127.0.0.1, or set MEDLOOP_AUTH=proxy behind an authenticating proxy."
        )


def check_request(settings: AuthSettings, headers: Mapping[bytes, bytes]) -> None:
    """Raise Forbidden for a request that a foreign page sent through somebody's browser."""
    if settings.auth == "proxy":
        return
    host = headers.get(b"host", b"").decode("latin-1")
    if not _names_loopback(host):
        raise Forbidden("This service answers on loopback only; call it as 127.0.0.1 or localhost.")
    origin = headers.get(b"origin")
    if origin is not None and _parsed(origin.decode("latin-1")).netloc != host:
        raise Forbidden("Requests from another web page are refused.")


@lru_cache(maxsize=64)
def _names_loopback(host: str) -> bool:
    return is_loopback(_parsed(f"//{host}").hostname or "")


def _parsed(address: str) -> SplitResult:
    try:
        return urlsplit(address)
    except ValueError as exc:
        raise Forbidden("The Host or Origin header is no address.") from exc
