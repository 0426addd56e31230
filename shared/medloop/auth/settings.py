"""`MEDLOOP_AUTH` and what belongs to it."""

from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from medloop.auth.exposure import is_loopback

_ALONE = frozenset({"loopback", "proxy"})
_TOGETHER = frozenset({"keys", "oidc"})


def check_secure(url: str) -> str:
    """`url`; raises ValueError unless it is https, or stays on this machine."""
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname or "")):
        raise ValueError("the address must begin with https://")
    return url


SecureUrl = Annotated[str, AfterValidator(check_secure)]


class AuthSettings(BaseSettings):
    """Who is let in.

    `MEDLOOP_AUTH` is `loopback` (the default: this machine only, without credentials), `keys`, `oidc`, `keys,oidc`, or
    `proxy` where an authenticating proxy stands in front and every request that arrives is trusted. With keys or OIDC
    callers on loopback need credentials too.
    """

    model_config = SettingsConfigDict(env_prefix="MEDLOOP_", extra="ignore")

    auth: str = "loopback"
    keys_seconds: float = Field(default=10.0, gt=0)
    """How often a service reads the keys anew: a revoked one works for at most this long."""
    rate: float | None = Field(default=None, gt=0)
    """Requests a second that one caller may send, unless its key says otherwise."""
    oidc_issuer: SecureUrl | None = None
    oidc_audience: str | None = None
    oidc_scope_claims: str = "scope,scp,roles"
    """Claims that hold scopes, as words or a list; a dot leads into an object (`realm_access.roles`)."""
    oidc_roles: dict[str, str] = {}
    """What else stands for scopes: `{"radiologist": "predict correct"}`."""
    oidc_name_claim: str = "sub"
    """What a person is called; only `sub` is unique by the standard (OpenID Connect Core 1.0, 5.7)."""

    @field_validator("auth")
    @classmethod
    def _known(cls, value: str) -> str:
        modes = [mode.strip() for mode in value.split(",")]
        if len(modes) == len(set(modes)) and (set(modes) <= _TOGETHER or (set(modes) <= _ALONE and len(modes) == 1)):
            return ",".join(sorted(modes))
        raise ValueError("choose loopback, keys, oidc, keys,oidc or proxy")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.oidc and not (self.oidc_issuer and self.oidc_audience):
            raise ValueError("MEDLOOP_AUTH=oidc needs MEDLOOP_OIDC_ISSUER and MEDLOOP_OIDC_AUDIENCE")
        return self

    @property
    def loopback(self) -> bool:
        return self.auth == "loopback"

    @property
    def proxy(self) -> bool:
        return self.auth == "proxy"

    @property
    def keys(self) -> bool:
        return "keys" in self.auth.split(",")

    @property
    def oidc(self) -> bool:
        return "oidc" in self.auth.split(",")
