"""The database that a search lives in: SQLite's one file for one machine, PostgreSQL for many; SQLAlchemy's and
Optuna's errors are translated here."""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from medloop.errors import InvalidRequest, StorageFull, StorageUnavailable
from medloop.settings import mask_url
from medloop.storage.disk import disk_errors
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage

DATABASE_ERRORS = (StorageInternalError, sqlalchemy.exc.SQLAlchemyError)
_OPENINGS = 5  # attempts; several processes that make the tables at once get into each other's way
_PAUSE = 0.1  # seconds before the second of them, and as many more before each that follows


@dataclass(frozen=True, slots=True)
class Signs:
    """Whole seconds: `every` so often a process says that it lives, and after `grace` without a sign it does not.
    A point whose processes died is tried `retries` times more: perhaps it is what kills them."""

    every: int = 30
    grace: int = 150
    retries: int = 2


def open_database(url: str, signs: Signs) -> RDBStorage:
    """Connect, and make the tables where there are none.

    Raises InvalidRequest for an address that is none or of another kind, StorageFull and StorageUnavailable.
    """
    # What it warns of goes where our own log goes; what it tells of every trial we tell ourselves.
    optuna.logging.disable_default_handler()
    optuna.logging.enable_propagation()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    arguments = _arguments(url)
    for attempt in range(1, _OPENINGS + 1):
        try:
            with experimental():
                storage = RDBStorage(
                    url.replace("{", "{{").replace("}", "}}"),  # Optuna takes it for a template
                    engine_kwargs=arguments,
                    heartbeat_interval=signs.every,
                    grace_period=signs.grace,
                )
            break
        except ImportError as exc:
            raise InvalidRequest(f"Nothing that speaks to {mask_url(url)} is installed.") from exc
        except RuntimeError as exc:
            raise InvalidRequest(f"{mask_url(url)} was made by another version of Optuna. {exc}") from exc
        except DATABASE_ERRORS as exc:
            if attempt == _OPENINGS or not _raced(exc):
                raise _away(url, exc) from exc
            time.sleep(_PAUSE * attempt)
    if storage.engine.dialect.name == "sqlite":
        sqlalchemy.event.listen(storage.engine, "begin", _lock)
    return storage


def _raced(exc: Exception) -> bool:
    """Whether another process made the tables in between."""
    # Optuna wraps SQLAlchemy's errors, or lets them through; each of them wraps the driver's.
    told = (exc, exc.__cause__)
    return any(isinstance(each, sqlalchemy.exc.IntegrityError) or "already exists" in str(each) for each in told)


def _arguments(url: str) -> dict[str, Any]:
    """How SQLAlchemy is to connect to `url`."""
    try:
        address = sqlalchemy.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError) as exc:
        raise InvalidRequest(f"MEDLOOP_SEARCH_URL {mask_url(url)} is no address of a database.") from exc
    if address.get_backend_name() == "postgresql":
        return {"pool_pre_ping": True}
    if address.get_backend_name() != "sqlite" or not address.database:
        raise InvalidRequest("MEDLOOP_SEARCH_URL must begin with sqlite:/// and name a file, or with postgresql://.")
    folder = Path(address.database).parent
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    # Transactions are begun by `_lock`, not by Python's module.
    return {"connect_args": {"timeout": 60, "isolation_level": None}}


def _lock(connection: sqlalchemy.Connection) -> None:
    """SQLite's transactions take the lock when they begin: what one of them reads still holds when it writes, and two
    processes never take the same waiting trial."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")


@contextmanager
def experimental() -> Iterator[None]:
    """Optuna calls its heartbeats experimental, and made for `optimize`: see `Study._alive`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used with")
        yield


@contextmanager
def database_errors(url: str) -> Iterator[None]:
    try:
        yield
    except DATABASE_ERRORS as exc:
        raise _away(url, exc) from exc


def _away(url: str, exc: Exception) -> StorageUnavailable | StorageFull:
    cause = exc.__cause__ if isinstance(exc, StorageInternalError) else exc
    reason = str(getattr(cause, "orig", None) or cause or exc).splitlines()[0]
    if "disk is full" in reason:
        return StorageFull(f"The disk of {mask_url(url)} is full; make room, then give the same command again.")
    return StorageUnavailable(
        f"The study's database {mask_url(url)} cannot be used ({reason}); bring it back, or set MEDLOOP_SEARCH_URL."
    )
