"""What may be listened on, and requests that only seem to come from this machine.

Without API keys or OIDC a service listens on loopback only, and answers only requests that really came for loopback:
a page in somebody's browser can reach 127.0.0.1 too, under another name (DNS rebinding) or from another origin. With
them that is no danger: a browser adds no bearer token by itself.
"""

import ipaddress
import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Protocol
from urllib.parse import SplitResult, urlsplit

from medloop.errors import Forbidden

logger = logging.getLogger(__name__)


class _Modes(Protocol):
    @property
    def loopback(self) -> bool: ...
    @property
    def proxy(self) -> bool: ...


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address without port, means this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_exposure(settings: _Modes, host: str) -> None:
    """Refuse to open a service to the network without access control."""
    if settings.proxy:
        logger.warning("MEDLOOP_AUTH=proxy: every request that arrives is trusted; keep this port behind the proxy")
    elif settings.loopback and not is_loopback(host):
        raise Forbidden(
            f"Nothing is open by default: listening on {host} needs access control. "
            "Listen on 127.0.0.1, or set MEDLOOP_AUTH to keys or oidc, or to proxy behind an authenticating proxy."
        )


def check_request(headers: Mapping[bytes, bytes]) -> None:
    """Raise Forbidden for a request that a foreign page sent through somebody's browser."""
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
