"""From a verified bundle to a network that may answer: opened on an engine, its golden inputs checked, and warm."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from medloop.bundle import Bundle
from medloop.engines import REFERENCE_ENGINE, REFERENCE_PRECISION, Network, open_network
from medloop.errors import MedLoopError, UntrustedModel
from medloop.schemas import EngineCheck, ModelRef

logger = logging.getLogger(__name__)

WARM_UP_SECONDS = 0.5
"""How long a network is run on ever larger batches before it answers: it lays out its memory at the first batch of a
size, and someone would wait for that."""

FindCheck = Callable[[str, str], EngineCheck | None]
"""Given a version and its bundle's digest, what the evaluator found when it checked the wanted engine and precision
(`medloop.engines.checks.find_check`)."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The engine and precision that a setting asks for, and who has checked them. `threads` bounds those of one run;
    `largest_batch` is how many images a run may have, for warming up."""

    engine: str = REFERENCE_ENGINE
    precision: str = REFERENCE_PRECISION
    threads: int | None = None
    largest_batch: int = 1
    find_check: FindCheck = lambda version, digest: None

    @property
    def is_reference(self) -> bool:
        return (self.engine, self.precision) == (REFERENCE_ENGINE, REFERENCE_PRECISION)


@dataclass(frozen=True, slots=True)
class Opened:
    """A network, what it was checked against where it is not the reference, and else why it is, if that was not
    wanted."""

    network: Network
    checks: tuple[EngineCheck, ...] = ()
    doubt: str | None = None


def open_wanted(bundle: Bundle, version: str, wanted: Wanted) -> Opened:
    """The network as it is wanted, or what the version means, float32 on ONNX Runtime, where that cannot be.

    Raises UntrustedModel when the bundle has no network that answers as it did in training.
    """
    doubt = None
    if not wanted.is_reference:
        try:
            return _open_checked(bundle, version, wanted)
        except MedLoopError as exc:
            doubt = (
                f"Version {version} answers in {REFERENCE_PRECISION} on {REFERENCE_ENGINE} instead of "
                f"{wanted.precision} on {wanted.engine}: {exc.detail}"
            )
    network = open_network(bundle, threads=wanted.threads)
    network.check_golden()
    warm_up(network, wanted.largest_batch)
    return Opened(network, doubt=doubt)


def _open_checked(bundle: Bundle, version: str, wanted: Wanted) -> Opened:
    checked = wanted.find_check(version, bundle.digest)
    if checked is None:
        raise UntrustedModel("nobody knows how close they are; have the evaluator check it first.")
    network = open_network(bundle, wanted.engine, wanted.precision, wanted.threads)
    golden = network.check_golden()
    warm_up(network, wanted.largest_batch)
    return Opened(network, (golden, checked))


def reference(model: str, version: str, network: Network) -> ModelRef:
    """What answers name when `network` gives them."""
    card = network.bundle.card
    return ModelRef(
        name=model,
        version=version,
        run_id=card.run_id,
        dataset_id=card.dataset_id,
        bundle_digest=network.bundle.digest,
        engine=network.engine,
        precision=network.precision,
    )


def warm_up(network: Network, largest_batch: int) -> None:
    """Run batches of 1, 2, 4, … images up to `largest_batch`, and that; larger ones only while there is time.

    Raises UntrustedModel when the network fails on one."""
    image = network.bundle.golden.prepared[:1]  # uint8 [1, S, S, C]
    deadline = time.monotonic() + WARM_UP_SECONDS
    size = 1
    while time.monotonic() < deadline:
        try:
            network.run(np.repeat(image, size, axis=0))
        except Exception as exc:  # engines share no narrower base
            raise UntrustedModel(f"The network cannot answer {size} images at once: {exc}") from exc
        if size >= largest_batch:
            return
        size = min(2 * size, largest_batch)
