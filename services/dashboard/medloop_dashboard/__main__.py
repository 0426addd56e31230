"""`python -m medloop_dashboard`: become Streamlit, configured by flags only.

The process is replaced, not kept waiting beside a child, so that a signal reaches what serves and the exit status is
its own.
"""

import logging
import os
import socket
import sys
from pathlib import Path

from medloop.auth import AuthSettings, check_exposure, is_loopback
from medloop.errors import Forbidden, MedLoopError, PortInUse
from medloop.settings import DEFAULT_PORTS, ServerSettings, read_settings

from medloop_dashboard.settings import DashboardSettings

logger = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("app.py")


def command(server: ServerSettings, auth: AuthSettings, settings: DashboardSettings) -> list[str]:
    """The command line that serves the dashboard as `server` and `auth` say, to whom `settings.person` names alone or
    to all.

    Raises Forbidden for an address that others can reach when nothing stands in front: a browser sends no API key,
    so keys keep nobody out of pages. Also for a header to be checked that nobody would look at.
    """
    if settings.user_token_header is not None and not auth.proxy:
        raise Forbidden(
            "MEDLOOP_USER_TOKEN_HEADER is checked only with MEDLOOP_AUTH=proxy: set that too, or unset all "
            "MEDLOOP_USER_TOKEN_* settings."
        )
    if settings.person is not None:
        if auth.proxy:
            raise Forbidden("Leave MEDLOOP_PERSON unset with MEDLOOP_AUTH=proxy: the proxy says who somebody is.")
        logger.warning(
            "MEDLOOP_PERSON: whoever reaches %s is %s; publish this port on loopback", server.host, settings.person
        )
    elif not auth.proxy and not is_loopback(server.host):
        raise Forbidden(
            f"Keys and tokens do not guard the dashboard's pages: listening on {server.host} needs "
            "MEDLOOP_AUTH=proxy, behind a proxy that signs people in, or MEDLOOP_PERSON, in a container whose port "
            "only one person's machine reaches."
        )
    else:
        check_exposure(auth, server.host)
    port = server.port or DEFAULT_PORTS["dashboard"]
    options: dict[str, str] = {
        "server.address": server.host,
        "server.port": str(port),
        "server.headless": "true",
        "server.fileWatcherType": "none",
        "server.enableCORS": "true",
        "server.enableXsrfProtection": "true",
        "server.enableStaticServing": "false",
        "server.enableAgentApi": "false",
        "server.maxUploadSize": str(server.max_body_bytes // 2**20),
        "browser.gatherUsageStats": "false",
        "browser.serverAddress": server.host,
        # What goes wrong unforeseen is told in the log; a browser gets no traceback and no values.
        "client.showErrorDetails": "none",
        "client.showErrorLinks": "false",
        "client.toolbarMode": "minimal",
        "runner.magicEnabled": "false",
        "logger.level": server.log_level.lower(),
        "theme.base": "light",
        "theme.primaryColor": "#1f5f8b",
        "theme.textColor": "#1c2733",
        "theme.baseRadius": "small",
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    if not auth.proxy:
        # A foreign page must not reach this one under another name (DNS rebinding).
        flags += [f"--server.allowedHosts={host}" for host in ("127.0.0.1", "localhost", "::1")]
    return [sys.executable, "-m", "streamlit", "run", str(PAGE), *flags]


def check_port(server: ServerSettings) -> None:
    """Raise PortInUse when something listens there already."""
    port = server.port or DEFAULT_PORTS["dashboard"]
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((server.host, port))
        except OSError as exc:
            raise PortInUse(
                f"The dashboard cannot listen on {server.host} port {port} ({exc.strerror}): "
                "stop what listens there, or set MEDLOOP_PORT."
            ) from exc


def main() -> None:
    try:
        server = read_settings(ServerSettings)
        arguments = command(server, read_settings(AuthSettings), read_settings(DashboardSettings))
        check_port(server)
    except MedLoopError as error:
        sys.stderr.write(f"{error.detail}\n")
        sys.exit(error.exit_status)
    os.execv(arguments[0], arguments)  # noqa: S606 - our own command line, no shell


if __name__ == "__main__":
    main()
