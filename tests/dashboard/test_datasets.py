"""What a data set version holds."""

import pytest
from medloop.data.manifest import Manifest
from medloop.errors import InvalidDataset, NotFound
from medloop.storage.objects import ObjectStore
from medloop_dashboard.datasets import read_facts


def test_reads_counts_and_leaks(objects: ObjectStore, manifest: Manifest) -> None:
    facts = read_facts(objects, manifest.id)
    assert facts.counts == manifest.counts()
    assert facts.images == 40
    assert facts.in_split("train") == len(manifest.of("train"))
    assert facts.leaks is not None
    assert facts.leaks.exact == 1


def test_a_version_without_a_leak_report(objects: ObjectStore, manifest: Manifest) -> None:
    objects.delete(f"datasets/{manifest.id}/leaks.json")
    assert read_facts(objects, manifest.id).leaks is None


def test_unknown_and_damaged_versions(objects: ObjectStore, manifest: Manifest) -> None:
    with pytest.raises(NotFound):
        read_facts(objects, "f" * 64)
    for damage in (b"{", b"[]", b"{}"):
        objects.put(f"datasets/{manifest.id}/dataset.json", damage)
        with pytest.raises(InvalidDataset, match="damaged"):
            read_facts(objects, manifest.id)
