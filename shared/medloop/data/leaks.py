"""Images of one split that stand, exactly or nearly, in another one.

*Exact* means equal decoded pixels. *Near* means perceptual hashes (`medloop.data.phash`) that differ in at most
`distance` of their 64 bits, in any of the eight forms that mirroring and quarter turns make. On 3,000 images of
LC25000, which was enlarged by turned copies, those forms find four times as many within 2 bits as upright ones alone,
and none of another class; on the 11,522 of BreastMNIST, PneumoniaMNIST and BCCD they find six more.

Caveat: on medical images taken alike, hashes of different patients come close. Within 2 bits most pairs are neighbours
of one scan or copies; beyond, whole classes melt together. So near duplicates are pointed out, never grouped
transitively, and never a reason to drop a test image.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, combinations, pairwise, product
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from medloop.data.manifest import SPLITS, Manifest, Row, Split, dataset_key
from medloop.data.parallel import ProgressFn, batched, ordered_map, workers_for
from medloop.data.phash import hash_plane, perceptual_hashes
from medloop.errors import InvalidDataset, InvalidRequest
from medloop.storage.objects import ObjectStore
from medloop.vision.decode import decode

_BITS: Final = 64
_EXAMPLES: Final = 20
_BATCH: Final = 64  # images

_Close = tuple[int, int]
_Key = TypeVar("_Key", str, int)


class LeakPair(BaseModel):
    """Two images in different splits; `distance` in bits, `exact` when their pixels are equal."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    distance: int
    exact: bool
    splits: tuple[Split, Split]
    labels: tuple[str, str]
    byte_hashes: tuple[str, str]


class LeakCount(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    exact: int = 0
    near: int = 0


class LeakReport(BaseModel):
    """How much of a data set stands in two splits.

    Counted are different images (by pixel hash): `exact` those that stand in more than one split, `near` those of
    which another split holds one within `distance` bits, **the exact ones included**. So a pair of near, not equal,
    images counts twice in `near`, and a pair of equal ones once. `by_split` is keyed `train/test` and so on, `by_class`
    by the class of the image counted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    distance: int
    images: int
    exact: int
    near: int
    by_split: dict[str, LeakCount]
    by_class: dict[str, LeakCount]
    examples: tuple[LeakPair, ...]

    def to_document(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def to_json(self) -> str:
        return self.model_dump_json(indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> "LeakReport":
        """Raises `InvalidDataset` for anything but a leak report."""
        try:
            return cls.model_validate_json(text)
        except ValueError as exc:
            raise InvalidDataset("The stored leak report is damaged; run `medloop dataset check` again.") from exc

    def table(self) -> list[tuple[str, int, int]]:
        """(what, exact, near) for people: the whole, then pairs of splits, then classes."""
        parts = [(f"{name} (splits)", count) for name, count in self.by_split.items()]
        parts += [(f"{name} (class)", count) for name, count in self.by_class.items()]
        return [("all", self.exact, self.near), *((name, count.exact, count.near) for name, count in parts)]


def find_leaks(rows: Sequence[Row], phashes: NDArray[np.uint64], distance: int = 2) -> LeakReport:
    """Compare all images across splits; `phashes` uint64 [N, 8] belong to `rows`, `distance` is in bits (0 to 63).

    Exact for every distance, in memory that grows with N. Time grows with the number of images that share a part of
    their hash, so it is seconds for 100,000 images at 2 bits and grows steeply with the distance.
    """
    if not 0 <= distance < _BITS:
        raise InvalidRequest(f"The distance for near duplicates is {distance} bits; choose one from 0 to {_BITS - 1}.")
    split_bit = np.array([1 << SPLITS.index(row.split) for row in rows], dtype=np.uint8)
    near, pairs = _near(phashes, split_bit, distance)
    exact = np.array(_splits_of_equal_pixels(rows), dtype=np.uint8) & ~split_bit
    near |= exact
    return LeakReport(
        distance=distance,
        images=len(rows),
        exact=_distinct(rows, exact > 0),
        near=_distinct(rows, near > 0),
        by_split=_by_split(rows, split_bit, exact, near),
        by_class=_by_class(rows, exact, near),
        examples=_examples(rows, np.flatnonzero(near), phashes, pairs),
    )


def check_leaks(
    manifest: Manifest, objects: ObjectStore, *, distance: int = 2, progress: ProgressFn | None = None
) -> LeakReport:
    """Look for leaks in a stored version, reading all of its images again; `distance` as in `find_leaks`."""
    hashes: list[NDArray[np.uint64]] = []

    def hashed(rows: Sequence[Row]) -> NDArray[np.uint64]:
        return perceptual_hashes(np.stack([hash_plane(decode(objects.get(row.location)).pixels) for row in rows]))

    for batch in ordered_map(hashed, batched(manifest.rows, _BATCH), workers=workers_for(objects)):
        hashes.append(batch)
        if progress:
            progress("looking for leaks", sum(map(len, hashes)), len(manifest.rows))
    return find_leaks(manifest.rows, np.concatenate(hashes), distance)


def load_leaks(objects: ObjectStore, dataset_id: str) -> LeakReport:
    """The report that was stored when the version was built; raises `NotFound` without one."""
    return LeakReport.from_json(objects.get(leaks_key(dataset_id)))


def leaks_key(dataset_id: str) -> str:
    return dataset_key(dataset_id, "leaks.json")


def exact_leaks(manifest: Manifest) -> tuple[str, ...]:
    """The pixel hashes that stand in more than one split, sorted."""
    own = (1 << SPLITS.index(row.split) for row in manifest.rows)
    masks = zip(manifest.rows, _splits_of_equal_pixels(manifest.rows), own, strict=True)
    return tuple(sorted({row.pixel_hash for row, mask, bit in masks if mask != bit}))


def leaked_rows(manifest: Manifest, split: Split) -> NDArray[np.int64]:
    """The numbers of the rows of `split` whose pixels also stand in a split that judges it: train is judged by val,
    both by calibration, all by test. Whoever learns from `split` leaves them out; test has none."""
    judging = np.flatnonzero(manifest.columns.splits > SPLITS.index(split))
    return rows_alike(manifest, manifest.columns.rows_of(split), manifest, judging)


def rows_alike(
    manifest: Manifest, rows: NDArray[np.int64], other: Manifest, others: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Those of `rows` that have the same pixels as one of `others`, which are rows of `other`."""
    keys, other_keys = manifest.columns.pixels[rows], other.columns.pixels[others]
    shared = np.intersect1d(keys, other_keys)
    hashes = {other.rows[i].pixel_hash for i in others[np.isin(other_keys, shared)].tolist()}
    alike = rows[np.isin(keys, shared)]
    return np.array([i for i in alike.tolist() if manifest.rows[i].pixel_hash in hashes], dtype=np.int64)


def _near(
    phashes: NDArray[np.uint64], split_bit: NDArray[np.uint8], distance: int
) -> tuple[NDArray[np.uint8], list[_Close]]:
    """For each of N images a bit mask of the other splits that hold a near one, and some close pairs of hashes, closest
    first. Compared is the upright form of one image with all forms of the other, both ways round.

    Hashes that differ in `distance` bits agree in one of `distance` + 1 bands at least (pigeonhole). Sorted by such a
    band, agreeing ones are neighbours: entry i is compared with i + 1, then i + 2, … as long as the band is the same.
    """
    unique, inverse = np.unique(phashes, return_inverse=True)
    inverse = inverse.reshape(phashes.shape)
    upright, forms = np.zeros((2, len(unique)), dtype=np.uint8)  # which splits have an image with this hash
    np.bitwise_or.at(upright, inverse[:, 0], split_bit)
    np.bitwise_or.at(forms, inverse, split_bit[:, np.newaxis])
    from_upright, from_form = forms.copy(), upright.copy()  # which splits are near an image with this hash
    pairs: dict[_Close, int] = {}
    for one, other in _agreeing(unique, upright > 0, distance):
        bits = np.bitwise_count(unique[one] ^ unique[other])
        close = np.flatnonzero(bits <= distance)
        if len(close):
            one, other = one[close], other[close]
            # Within one step neither side repeats, so that |= on an index loses nothing.
            from_upright[one] |= forms[other]
            from_upright[other] |= forms[one]
            from_form[one] |= upright[other]
            from_form[other] |= upright[one]
            _remember(pairs, unique[one], unique[other], np.bitwise_count(forms[one] | forms[other]) > 1)
    reached = from_upright[inverse[:, 0]] | np.bitwise_or.reduce(from_form[inverse], axis=1)
    return reached & ~split_bit, sorted(pairs, key=lambda pair: (pairs[pair], pair))


def _agreeing(
    hashes: NDArray[np.uint64], upright: NDArray[np.bool_], distance: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs of hashes that agree in a band, one of them upright at least; some come more than once."""
    edges = [round(_BITS * i / (distance + 1)) for i in range(distance + 2)]
    for low, high in pairwise(edges):
        band = (hashes >> np.uint64(low)) & np.uint64(2 ** (high - low) - 1)
        order = np.lexsort((~upright, band))  # upright ones lead their run, so that they meet all others in it
        ends = np.searchsorted(band[order], band[order], side="right")
        places, step = np.flatnonzero(upright[order]), 1
        while len(places := places[places + step < ends[places]]):
            yield order[places], order[places + step]
            step += 1


def _remember(
    pairs: dict[_Close, int], one: NDArray[np.uint64], other: NDArray[np.uint64], across: NDArray[np.bool_]
) -> None:
    """Keep a bounded number of pairs that lie in different splits, as examples."""
    for i in np.flatnonzero(across)[:_EXAMPLES].tolist():
        if len(pairs) < 10 * _EXAMPLES:
            pair = min((int(one[i]), int(other[i])), (int(other[i]), int(one[i])))
            pairs[pair] = (pair[0] ^ pair[1]).bit_count()


def _splits_of_equal_pixels(rows: Sequence[Row]) -> list[int]:
    """For each row the bit mask of all splits that hold its pixels, its own included."""
    masks: dict[str, int] = {}
    for row in rows:
        masks[row.pixel_hash] = masks.get(row.pixel_hash, 0) | 1 << SPLITS.index(row.split)
    return [masks[row.pixel_hash] for row in rows]


def _distinct(rows: Sequence[Row], chosen: NDArray[np.bool_]) -> int:
    return len({rows[i].pixel_hash for i in np.flatnonzero(chosen).tolist()})


def _by_split(
    rows: Sequence[Row], own: NDArray[np.uint8], exact: NDArray[np.uint8], near: NDArray[np.uint8]
) -> dict[str, LeakCount]:
    counts: dict[str, LeakCount] = {}
    for (i, one), (j, other) in combinations(enumerate(SPLITS), 2):

        def between(reached: NDArray[np.uint8], a: int = 1 << i, b: int = 1 << j) -> int:
            forth = (own == a) & (reached & b > 0)
            back = (own == b) & (reached & a > 0)
            return _distinct(rows, forth | back)

        count = LeakCount(exact=between(exact), near=between(near))
        if count.near:
            counts[f"{one}/{other}"] = count
    return counts


def _by_class(rows: Sequence[Row], exact: NDArray[np.uint8], near: NDArray[np.uint8]) -> dict[str, LeakCount]:
    labels = np.array([row.label for row in rows])
    counts = {}
    for label in sorted(set(labels[near > 0].tolist())):
        of_class = labels == label
        counts[label] = LeakCount(
            exact=_distinct(rows, of_class & (exact > 0)), near=_distinct(rows, of_class & (near > 0))
        )
    return counts


def _examples(
    rows: Sequence[Row], leaked: NDArray[np.intp], phashes: NDArray[np.uint64], pairs: Sequence[_Close]
) -> tuple[LeakPair, ...]:
    """At most 20 pairs of `leaked` rows: equal pixels, then equal hashes, then the close ones in `pairs`."""
    numbers: list[int] = leaked.tolist()
    by_pixels = _one_a_split(rows, ((i, rows[i].pixel_hash) for i in numbers))
    upright = _one_a_split(rows, ((i, int(phashes[i, 0])) for i in numbers))
    forms = _one_a_split(rows, ((i, form) for i in numbers for form in phashes[i].tolist()))
    equal = ((one, one) for one in upright)
    both_ways = chain.from_iterable((pair, pair[::-1]) for pair in pairs)
    candidates = chain(
        ((0, i, j) for places in by_pixels.values() for i, j in combinations(places.values(), 2)),
        (
            ((one ^ other).bit_count(), i, j)
            for one, other in chain(equal, both_ways)
            for i, j in product(upright.get(one, {}).values(), forms.get(other, {}).values())
        ),
    )
    examples: dict[tuple[int, int], LeakPair] = {}
    for distance, i, j in candidates:
        if rows[i].split != rows[j].split:
            examples.setdefault((min(i, j), max(i, j)), _pair(rows[i], rows[j], distance))
        if len(examples) == _EXAMPLES:
            break
    return tuple(examples.values())


def _one_a_split(rows: Sequence[Row], keyed: Iterable[tuple[int, _Key]]) -> dict[_Key, dict[Split, int]]:
    """For each key the number of its first row in each split that has one."""
    places: dict[_Key, dict[Split, int]] = {}
    for i, key in keyed:
        places.setdefault(key, {}).setdefault(rows[i].split, i)
    return places


def _pair(one: Row, other: Row, distance: int) -> LeakPair:
    first, second = sorted((one, other), key=lambda row: SPLITS.index(row.split))
    return LeakPair(
        distance=distance,
        exact=first.pixel_hash == second.pixel_hash,
        splits=(first.split, second.split),
        labels=(first.label, second.label),
        byte_hashes=(first.byte_hash, second.byte_hash),
    )
