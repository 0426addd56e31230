"""Whether another engine or precision answers closely enough: both answer the calibration split, batch by batch."""

import time
from collections.abc import Iterator
from statistics import median

import numpy as np
from medloop.bundle import Bundle, Pixels
from medloop.cpus import cpu_name
from medloop.data.cache import open_cache
from medloop.data.manifest import load_manifest
from medloop.engines import REFERENCE_ENGINE, REFERENCE_PRECISION, Network, check_offered, open_network
from medloop.engines.checks import VERDICTS, compare, engine_version, judge
from medloop.errors import InvalidDataset, InvalidRequest
from medloop.registry import TAG_DATASET, TAG_DIGEST, Registry, Version, fetch_bundle
from medloop.schemas import EngineCheck, EngineVerdict
from medloop.settings import HomeSettings
from medloop.storage.objects import ObjectStore
from medloop.storage.records import RecordStore
from numpy.typing import NDArray

from medloop_evaluator.answers import Progress

_BATCH = 16  # images: as many as inference answers at once on a busy day
_ROUNDS = 3  # of each batch: the fastest is the one that nothing else slowed down


class EngineChecker:
    """Compares engines on real images, and keeps what it found as records of kind `engine_checks`."""

    def __init__(self, registry: Registry, objects: ObjectStore, records: RecordStore, home: HomeSettings) -> None:
        self._registry, self._objects, self._records, self._home = registry, objects, records, home

    def key(self, version: Version, engine: str, precision: str) -> str:
        """What makes two checks the same work: the same bundle, data, engine and processor.

        Raises InvalidRequest for what cannot be checked here, or need not be.
        """
        check_offered(engine, precision)
        if (engine, precision) == (REFERENCE_ENGINE, REFERENCE_PRECISION):
            raise InvalidRequest(f"{precision} on {engine} is what others are compared with; it needs no check.")
        content = [version.tags.get(tag, "unnamed") for tag in (TAG_DIGEST, TAG_DATASET)]
        return "/".join(
            [version.model, version.version, *content, engine, precision, engine_version(engine), cpu_name()]
        )

    def check(self, version: Version, engine: str, precision: str, progress: Progress) -> EngineVerdict:
        """Answer the calibration split with both; the verdict is a record when this returns.

        Raises UntrustedModel where either fails on the golden inputs, InvalidDataset where there is no calibration
        split.
        """
        bundle = fetch_bundle(self._registry, version, self._home.bundles_dir)
        reference, other = open_network(bundle), open_network(bundle, engine, precision)
        for network in (reference, other):
            network.check_golden()
        images, rows = self._images(bundle, progress)
        batches = (images[rows[start : start + _BATCH]] for start in range(0, len(rows), _BATCH))
        check = compare_networks(reference, other, batches, len(rows), progress)
        reason = judge(check)
        verdict = EngineVerdict(
            model=version.model,
            version=version.version,
            bundle_digest=bundle.digest,
            dataset_id=bundle.card.dataset_id,
            engine_version=engine_version(engine),
            cpu=cpu_name(),
            check=check,
            passed=reason is None,
            reason=reason or "",
        )
        self._records.put_once(VERDICTS, verdict.id, verdict.model_dump(mode="json"))
        return verdict

    def _images(self, bundle: Bundle, progress: Progress) -> tuple[Pixels, NDArray[np.int64]]:
        manifest = load_manifest(self._objects, bundle.card.dataset_id)
        cache = open_cache(manifest, bundle.card.preparation, self._objects, self._home.cache_dir, progress=progress)
        rows = cache.indices("calibration")
        if len(rows) == 0:
            raise InvalidDataset(f"Data set {manifest.name} has no calibration split to compare engines on.")
        return cache.images, rows


def compare_networks(
    reference: Network, other: Network, batches: Iterator[Pixels], images: int, progress: Progress
) -> EngineCheck:
    """How far `other` lies from `reference` on `batches`, uint8 [n, S, S, C] each, of `images` in all, and how much
    faster it is: the median over the batches, on which both take turns."""
    expected, found, ratios = [], [], []
    done = 0
    for batch in batches:
        expected.append(reference.run(batch).probabilities)  # also warms both up for a batch of this size
        found.append(other.run(batch).probabilities)
        seconds = [(_seconds(reference, batch), _seconds(other, batch)) for _ in range(_ROUNDS)]
        ratios.append(min(ours for ours, _ in seconds) / min(theirs for _, theirs in seconds))
        done += len(batch)
        progress("compare", done, images)
    difference, agreement = compare(np.concatenate(expected), np.concatenate(found))
    return EngineCheck(
        engine=other.engine,
        precision=other.precision,
        source="calibration",
        images=done,
        max_difference=difference,
        agreement=agreement,
        speedup=median(ratios),
    )


def _seconds(network: Network, batch: Pixels) -> float:
    started = time.perf_counter()
    network.run(batch)
    return time.perf_counter() - started
