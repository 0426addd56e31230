"""Which image trains, which chooses the epoch, which calibrates and which tests.

The rules, in this order:

1. What an earlier version of the lineage holds stays where it is, and images that share its pixels or group go with
   it. The test split is frozen: later versions put nothing new into it but what the source itself calls test, and
   what belongs to a group or an image that is there already.
2. Splits given by the source are kept, also where exact duplicates stand in two of them (`medloop.data.leaks` reports
   those). Without a calibration split, half of val becomes one; without val, both are carved from train; without
   test, that is too. Images without a split among others that have one count as train.
3. All else is dealt out by hash rank within each class: no random state, no dependence on the order of the files.

Images with equal pixels, or of one group, are one unit and stay together (union-find, so transitively).
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from medloop.data.manifest import SPLITS, Manifest, Split

FRACTIONS: Final[Mapping[Split, float]] = {"train": 0.70, "val": 0.10, "calibration": 0.05, "test": 0.15}

# Which split a class fills first when it has too few units for all.
_NEED: Final[tuple[Split, ...]] = ("train", "test", "val", "calibration")
# Where an image goes that belongs to several: nothing that judges a model may slip into what trains it.
_PULL: Final[tuple[Split, ...]] = ("test", "calibration", "val", "train")

_NAMES: Final[Mapping[str, Split]] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "calibration": "calibration",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True, slots=True)
class SplitItem:
    """What the choice of a split rests on; `group` "" means none, `given` is what the source says."""

    pixel_hash: str
    label: str
    group: str = ""
    given: Split | None = None


def split_named(name: str) -> Split | None:
    """The split that people call `name` (`valid`, `Training`, …), or None."""
    return _NAMES.get(name.strip().lower())


def assign_splits(
    items: Sequence[SplitItem], previous: Manifest | None = None, fractions: Mapping[Split, float] = FRACTIONS
) -> tuple[Split, ...]:
    """The split of each item, by the rules above; `fractions` are of a class's images and need not sum to 1.

    Every class gets at least one image in each split where it has units enough; train comes first, then test, val and
    calibration. A split's share of a class differs from its fraction by no more than a few of its largest units.
    """
    given = frozenset(item.given for item in items if item.given)
    frozen = previous is not None and any(row.split == "test" for row in previous.rows)
    seen = _Seen()
    for row in previous.rows if previous else ():
        seen.add(row.pixel_hash, row.group, row.split)

    chosen: dict[int, Split] = {}
    pools: list[tuple[list[int], Mapping[Split, float]]] = []
    for pool in (*SPLITS, None):
        indices = [index for index, item in enumerate(items) if item.given == pool]
        pools.append((indices, _targets(pool, given, frozen, fractions)))
        chosen |= _inherited(items, indices, seen, pools[-1][1])
    for indices, targets in pools[:-1]:
        _assign_pool(items, indices, chosen, seen, targets)
    # Images without a split come last, since they follow those that have one.
    for index, split in chosen.items():
        seen.add(items[index].pixel_hash, items[index].group, split)
    indices, targets = pools[-1]
    chosen = _inherited(items, indices, seen, targets) | chosen
    _assign_pool(items, indices, chosen, seen, targets)
    return tuple(chosen[index] for index in range(len(items)))


class _Seen:
    """Where pixels and groups stand already."""

    def __init__(self) -> None:
        self._pixels: dict[str, set[Split]] = defaultdict(set)
        self._groups: dict[str, set[Split]] = defaultdict(set)

    def add(self, pixel_hash: str, group: str, split: Split) -> None:
        self._pixels[pixel_hash].add(split)
        if group:
            self._groups[group].add(split)

    def of_pixels(self, item: SplitItem, targets: Mapping[Split, float]) -> Split | None:
        """Where equal pixels stand: perhaps in two splits, then what the item's own split can become is first."""
        splits = self._pixels.get(item.pixel_hash, set())
        return _strongest(splits if item.given is None else splits & targets.keys()) or _strongest(splits)

    def of_group(self, item: SplitItem, targets: Mapping[Split, float]) -> Split | None:
        """Where the group stands. It does not draw an image out of a split that the source gave."""
        splits = self._groups.get(item.group, set())
        return _strongest(splits if item.given is None else splits & targets.keys())


def _inherited(
    items: Sequence[SplitItem], indices: Iterable[int], seen: _Seen, targets: Mapping[Split, float]
) -> dict[int, Split]:
    found = ((index, seen.of_pixels(items[index], targets)) for index in indices)
    return {index: split for index, split in found if split is not None}


def _targets(
    pool: Split | None, given: frozenset[Split], frozen: bool, fractions: Mapping[Split, float]
) -> dict[Split, float]:
    """Into which splits, by which weights, new images of a pool may go; the pool None has no given split."""
    if pool == "val" and "calibration" not in given:
        return {"val": 1.0, "calibration": 1.0}
    if pool not in (None, "train"):
        return {pool: 1.0}
    missing = set(SPLITS) - given - {"train"}
    if "val" in given:
        missing.discard("calibration")
    if frozen:
        missing.discard("test")
    return {split: fractions[split] for split in SPLITS if split in missing | {"train"}}


def _assign_pool(
    items: Sequence[SplitItem],
    indices: Sequence[int],
    chosen: dict[int, Split],
    seen: _Seen,
    targets: Mapping[Split, float],
) -> None:
    """Choose for the pool's items that are not in `chosen` yet: units that touch something known go there, the rest is
    dealt out."""
    open_units: dict[str, list[_Unit]] = defaultdict(list)
    homes: dict[str, set[Split]] = defaultdict(set)
    for index in indices:
        if index in chosen and items[index].group:
            homes[items[index].group].add(chosen[index])
    # Units of what is new alone: two old groups that one new image joins must not draw each other's images along.
    for new in _units(items, [index for index in indices if index not in chosen]):
        known = {seen.of_group(items[index], targets) for index in new} - {None}
        known |= {split for index in new for split in homes.get(items[index].group, ())}
        if items[new[0]].given is not None:
            known &= targets.keys()
        if (split := _strongest(split for split in known if split)) is not None:
            chosen.update(dict.fromkeys(new, split))
        else:
            unit = _Unit.of(new, items)
            open_units[unit.label].append(unit)
    counts: dict[str, Counter[Split]] = defaultdict(Counter)
    for index, split in chosen.items():
        counts[items[index].label][split] += 1
    for label, units in open_units.items():
        _deal(units, counts[label], targets, chosen)


@dataclass(frozen=True, slots=True)
class _Unit:
    """Images that stay together. `label` is the class most of them have; `rank` orders units as if at random."""

    indices: tuple[int, ...]
    label: str
    rank: str

    @classmethod
    def of(cls, indices: Sequence[int], items: Sequence[SplitItem]) -> "_Unit":
        labels = Counter(items[index].label for index in indices)
        label = min(labels, key=lambda name: (-labels[name], name))
        groups = [items[index].group for index in indices if items[index].group]
        key = f"group {min(groups)}" if groups else f"pixels {min(items[index].pixel_hash for index in indices)}"
        return cls(tuple(indices), label, hashlib.sha256(key.encode()).hexdigest())


def _deal(units: list[_Unit], counts: Counter[Split], targets: Mapping[Split, float], chosen: dict[int, Split]) -> None:
    """Give each unit of one class, by rank, to the split that lacks most images; `counts` are already there."""
    splits = [split for split in _NEED if targets.get(split, 0) > 0]
    total = sum(counts[split] for split in splits) + sum(len(unit.indices) for unit in units)
    scale = total / sum(targets[split] for split in splits)
    for place, unit in enumerate(sorted(units, key=lambda unit: unit.rank)):
        empty = [split for split in splits if not counts[split]]
        if len(units) - place <= len(empty):
            split = empty[0]
        else:
            split = max(splits, key=lambda name: targets[name] * scale - counts[name])
        counts[split] += len(unit.indices)
        chosen.update(dict.fromkeys(unit.indices, split))


def _units(items: Sequence[SplitItem], indices: Iterable[int]) -> list[list[int]]:
    """Connected components of `indices` under equal pixels or equal group."""
    parent = {index: index for index in indices}

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[tuple[str, str], int] = {}
    for index in parent:
        item = items[index]
        for key in (("pixels", item.pixel_hash), ("group", item.group)):
            if key[1]:
                parent[root(index)] = root(first.setdefault(key, index))
    components: dict[int, list[int]] = defaultdict(list)
    for index in parent:
        components[root(index)].append(index)
    return list(components.values())


def _strongest(splits: Iterable[Split]) -> Split | None:
    return min(splits, key=_PULL.index, default=None)
