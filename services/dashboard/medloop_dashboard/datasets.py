"""What a data set version holds, from the documents that were stored with it."""

import json
from dataclasses import dataclass

from medloop.data.leaks import LeakReport
from medloop.data.manifest import SPLITS, dataset_key
from medloop.errors import InvalidDataset, NotFound
from medloop.storage.objects import ObjectStore


@dataclass(frozen=True, slots=True)
class DatasetFacts:
    """`counts` are images by split and class; `leaks` is None for a version that was not built by MedLoop."""

    name: str
    classes: tuple[str, ...]
    counts: dict[str, dict[str, int]]
    leaks: LeakReport | None

    @property
    def images(self) -> int:
        return sum(sum(by_class.values()) for by_class in self.counts.values())

    def in_split(self, split: str) -> int:
        return sum(self.counts.get(split, {}).values())


def read_facts(objects: ObjectStore, dataset_id: str) -> DatasetFacts:
    """Raises NotFound for an unknown version, InvalidDataset for a damaged document, StorageUnavailable."""
    document = objects.get(dataset_key(dataset_id, "dataset.json"))
    try:
        summary = json.loads(document)
        counts = {str(split): dict(summary["counts"].get(split, {})) for split in SPLITS}
        name, classes = str(summary["name"]), tuple(summary["classes"])
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise InvalidDataset(
            f"The stored summary of data set {dataset_id[:12]} is damaged; restore it from a backup."
        ) from exc
    return DatasetFacts(name, classes, counts, _leaks(objects, dataset_id))


def _leaks(objects: ObjectStore, dataset_id: str) -> LeakReport | None:
    try:
        return LeakReport.from_json(objects.get(dataset_key(dataset_id, "leaks.json")))
    except NotFound:
        return None
