"""What every API is made with.

app.py       the factory: `/livez`, `/readyz`, `/metrics`, OpenAPI, and the routers a service adds
guard.py     what happens to each request before and after the application: id, access, limits, metrics
traced.py    a span around each request, where traces are on
held.py      what the bodies of all requests may take together
problems.py  problem details (RFC 9457) for every error
server.py    the server process: slow clients, too many connections, and how it stops
"""

from medloop.http.app import STOP_SECONDS, App, Readiness, create_app
from medloop.http.guard import Direct
from medloop.http.problems import Dialects, problem
from medloop.http.scopes import PRINCIPAL, require, route_scopes
from medloop.http.server import run, serve

__all__ = [
    "PRINCIPAL",
    "STOP_SECONDS",
    "App",
    "Dialects",
    "Direct",
    "Readiness",
    "create_app",
    "problem",
    "require",
    "route_scopes",
    "run",
    "serve",
]
