"""Where things are, for a command: the environment first, then what `medloop up` wrote down, then the defaults."""

import os
from functools import cached_property
from pathlib import Path

from medloop.errors import InvalidRequest, NotFound
from medloop.registry import CHALLENGER, CHAMPION, Registry, Version
from medloop.settings import DEFAULT_PORTS, HomeSettings, StorageSettings
from medloop.stack import StackState, read_state
from medloop.storage.objects import ObjectStore, open_objects
from medloop.storage.records import RecordStore, open_records


class Context:
    """The home folder of this command and what can be reached from it; stores are opened when first used."""

    def __init__(self) -> None:
        self.home: Path = HomeSettings().home.resolve()

    @cached_property
    def stack(self) -> StackState | None:
        state = read_state(self.home)
        return state if state is not None and state.running else None

    @cached_property
    def addresses(self) -> dict[str, str]:
        found = {name: f"http://127.0.0.1:{port}" for name, port in DEFAULT_PORTS.items()}
        if self.stack is not None:
            found |= self.stack.addresses
        for name in found:
            variable = "MLFLOW_TRACKING_URI" if name == "mlflow" else f"MEDLOOP_{name.upper()}_URL"
            found[name] = os.environ.get(variable, found[name])
        return found

    @cached_property
    def objects(self) -> ObjectStore:
        return open_objects(StorageSettings(home=self.home).objects_url)

    @cached_property
    def records(self) -> RecordStore:
        return open_records(StorageSettings(home=self.home).records_url)

    @cached_property
    def registry(self) -> Registry:
        return Registry(self.addresses["mlflow"])

    def last_model(self) -> str | None:
        """The model that runs here now, or was last trained from this home."""
        if self.stack is not None:
            return self.stack.model
        if named := os.environ.get("MEDLOOP_MODEL"):
            return named
        page = self.records.find("pipelines", limit=1)
        return str(page.items[0].document["model"]) if page.items else None

    def model(self, given: str | None) -> str:
        name = given or self.last_model()
        if name is None:
            raise InvalidRequest("No model is known here yet: name one, or run medloop demo first.")
        return name

    def version(self, model: str, given: str | None, *aliases: str) -> Version:
        """The version named by number or alias; else what the first of `aliases` that exists points at."""
        if given is not None and given.isdigit():
            return self.registry.version(model, given)
        for alias in (given,) if given else (aliases or (CHALLENGER, CHAMPION)):
            found = self.registry.at_alias(model, alias)
            if found is not None:
                return found
        wanted = given or " or ".join(aliases or (CHALLENGER, CHAMPION))
        raise NotFound(f"Model {model} has no version {wanted}; medloop status lists what there is.")
