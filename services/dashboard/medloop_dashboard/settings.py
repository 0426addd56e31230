"""Where the dashboard finds its neighbours: `MEDLOOP_INFERENCE_URL` and so on, `MEDLOOP_MODEL`, and whom it is for."""

from typing import Self

from medloop.auth.settings import SecureUrl
from medloop.schemas import Person
from medloop.settings import DEFAULT_PORTS
from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


def _loopback(service: str) -> str:
    return f"http://127.0.0.1:{DEFAULT_PORTS[service]}"


class DashboardSettings(BaseSettings):
    """Addresses of the services; `model` is the registered model that pages open with.

    `person` is who sits at this machine, where the dashboard runs in a container whose port the machine's loopback
    alone reaches: everything is done in that name, and no proxy's word is taken for another. `user_header` is where the
    proxy in front puts the name of whom it signed in. `user_token_header` is where a load balancer puts that signed,
    and then counts alone: `user_token_signer` is the load balancer's ARN, `user_token_keys` where its public keys lie,
    and `user_token_client`, compared if given, what it is to the identity provider.
    """

    model_config = SettingsConfigDict(env_prefix="MEDLOOP_", extra="ignore")

    inference_url: str = Field(default=_loopback("inference"))
    evaluator_url: str = Field(default=_loopback("evaluator"))
    explainer_url: str = Field(default=_loopback("explainer"))
    model: str | None = None
    person: Person | None = None
    user_header: str = Field(default="X-Forwarded-User", pattern=r"^[A-Za-z0-9-]+$")
    user_token_header: str | None = Field(default=None, pattern=r"^[A-Za-z0-9-]+$")
    user_token_signer: str | None = Field(default=None, min_length=1)
    user_token_keys: SecureUrl | None = None
    user_token_client: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _together(self) -> Self:
        # One that is misspelt must not leave the plain header in force.
        given = [self.user_token_header, self.user_token_signer, self.user_token_keys]
        if any([*given, self.user_token_client]) and not all(given):
            raise ValueError("MEDLOOP_USER_TOKEN_HEADER, _SIGNER and _KEYS go together: set all three or none")
        return self
