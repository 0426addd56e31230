"""Who may talk to a service, and what for.

settings.py   `MEDLOOP_AUTH` and what belongs to it
exposure.py   what may be listened on, and requests that only seem to come from this machine
principal.py  scopes, who a request is from, and in whose name things may be signed
keys.py       API keys: issued, rotated and revoked as records
keyring.py    the keys as a service knows them, whether the records are up or not
oidc.py       bearer tokens of an OpenID Connect provider
signed_header.py  whom a load balancer signed in, from the header that it signs
throttle.py   how often one caller may ask
access.py     all of it together, for one request
"""

from medloop.auth.access import ACT_AS_HEADER, OPEN_PATHS, Access
from medloop.auth.exposure import check_exposure, is_loopback
from medloop.auth.principal import ANONYMOUS, SCOPES, Principal, check_signed, principal
from medloop.auth.settings import AuthSettings

__all__ = [
    "ACT_AS_HEADER",
    "ANONYMOUS",
    "OPEN_PATHS",
    "SCOPES",
    "Access",
    "AuthSettings",
    "Principal",
    "check_exposure",
    "check_signed",
    "is_loopback",
    "principal",
]
