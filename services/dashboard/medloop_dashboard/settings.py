"""Where the dashboard finds its neighbours: `MEDLOOP_INFERENCE_URL` and so on, `MEDLOOP_MODEL`, and whom it is for."""

from medloop.schemas import Person
from medloop.settings import DEFAULT_PORTS
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


def _loopback(service: str) -> str:
    return f"http://127.0.0.1:{DEFAULT_PORTS[service]}"


class DashboardSettings(BaseSettings):
    """Addresses of the services; `model` is the registered model that pages open with.

    `person` is who sits at this machine, where the dashboard runs in a container whose port the machine's loopback
    alone reaches: everything is done in that name, and no proxy's word is taken for another. `user_header` is where the
    proxy in front puts the name of whom it signed in.
    """

    model_config = SettingsConfigDict(env_prefix="MEDLOOP_", extra="ignore")

    inference_url: str = Field(default=_loopback("inference"))
    evaluator_url: str = Field(default=_loopback("evaluator"))
    explainer_url: str = Field(default=_loopback("explainer"))
    model: str | None = None
    person: Person | None = None
    user_header: str = Field(default="X-Forwarded-User", pattern=r"^[A-Za-z0-9-]+$")
