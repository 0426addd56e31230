"""Leaks: the fast search agrees with comparing everything with everything, and counts what it says it counts."""

import hashlib
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from medloop.data.build import build_dataset
from medloop.data.leaks import LeakReport, check_leaks, exact_leaks, find_leaks, leaked_rows, load_leaks
from medloop.data.manifest import SPLITS, Manifest, Row, Split
from medloop.data.sources import RawImage, Source
from medloop.errors import InvalidDataset, InvalidRequest, NotFound
from medloop.storage.objects import ObjectStore
from medloop.vision.encode import encode_png
from numpy.typing import NDArray


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def row(number: int, split: Split, pixels: str | None = None, label: str = "a") -> Row:
    return Row(sha(f"{number}"), pixels or f"pixels {number}", label, split)


def forms(upright: Sequence[int]) -> NDArray[np.uint64]:
    """[N, 8]: the given upright hashes and seven more that are near nothing."""
    far = np.random.default_rng(7).integers(0, 2**63, (len(upright), 8), dtype=np.uint64)
    far[:, 0] = upright
    return far


@st.composite
def collections(draw: st.DrawFn) -> tuple[list[Row], NDArray[np.uint64]]:
    """Rows around a few centres; equal pixels have equal hashes, as they must."""
    centres = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3))
    content = st.tuples(st.sampled_from(centres), st.sets(st.integers(0, 63), max_size=3), st.integers(0, 7))
    images = draw(st.lists(content, min_size=1, max_size=12))
    hashes = []
    for seed, (centre, flips, form) in enumerate(images):
        eight = np.random.default_rng(seed).integers(0, 2**63, 8, dtype=np.uint64)
        eight[form] = centre ^ sum(1 << bit for bit in flips)
        hashes.append(eight)
    picks = draw(st.lists(st.tuples(st.integers(0, len(images) - 1), st.sampled_from(SPLITS)), min_size=1, max_size=20))
    rows = [row(i, split, f"pixels {pick}", "ab"[i % 2]) for i, (pick, split) in enumerate(picks)]
    return rows, np.stack([hashes[pick] for pick, _ in picks])


@given(collections(), st.integers(0, 9))
def test_it_finds_what_comparing_all_pairs_finds(
    collection: tuple[list[Row], NDArray[np.uint64]], distance: int
) -> None:
    rows, hashes = collection
    close = np.bitwise_count(hashes[:, np.newaxis, :1] ^ hashes[np.newaxis]).min(axis=2) <= distance
    close |= close.T
    apart = np.array([[a.split != b.split for b in rows] for a in rows])
    equal = np.array([[a.pixel_hash == b.pixel_hash for b in rows] for a in rows])

    def images(pairs: NDArray[np.bool_], *splits: Split) -> int:
        inside = np.array([[not splits or {a.split, b.split} == set(splits) for b in rows] for a in rows])
        return len({rows[i].pixel_hash for i in np.flatnonzero((pairs & apart & inside).any(axis=1)).tolist()})

    report = find_leaks(rows, hashes, distance)
    assert (report.exact, report.near) == (images(equal), images(close | equal))
    for pair, count in report.by_split.items():
        one, other = pair.split("/")
        assert (count.exact, count.near) == (images(equal, one, other), images(close | equal, one, other))  # type: ignore[arg-type]
    place = {row.byte_hash: i for i, row in enumerate(rows)}
    for example in report.examples:
        i, j = (place[byte_hash] for byte_hash in example.byte_hashes)
        assert (rows[i].split, rows[j].split) == example.splits
        assert example.splits[0] != example.splits[1]
        assert example.exact == equal[i, j]
        assert example.distance <= distance
        assert close[i, j]
    assert bool(report.examples) == (report.near > 0)


def test_a_pair_of_near_images_counts_twice_and_an_exact_one_once() -> None:
    rows = [row(0, "train"), row(1, "test"), row(2, "train", "same"), row(3, "val", "same"), row(4, "test", "alone")]
    report = find_leaks(rows, forms([0b0, 0b11, 0xFF << 40, 0xFF << 40, 0xFFFF << 20]))
    assert (report.exact, report.near, report.images) == (1, 3, 5)
    assert {pair: (count.exact, count.near) for pair, count in report.by_split.items()} == {
        "train/val": (1, 1),
        "train/test": (0, 2),
    }
    assert [(example.exact, example.distance) for example in report.examples] == [(True, 0), (False, 2)]


def test_turned_copies_are_near() -> None:
    hashes = forms([1, 2**33])
    hashes[1, 5] = 1
    assert find_leaks([row(0, "train"), row(1, "test")], hashes).near == 2


def test_copies_within_one_split_are_no_leak() -> None:
    rows = [row(0, "train", "same"), row(1, "train", "same"), row(2, "test")]
    report = find_leaks(rows, forms([5, 5, 2**40]))
    assert (report.exact, report.near, report.examples) == (0, 0, ())


def test_examples_are_few() -> None:
    rows = [row(i, ("train", "test")[i % 2]) for i in range(500)]
    report = find_leaks(rows, forms([0] * 500))
    assert report.near == 500
    assert len(report.examples) == 1  # one for each hash: a pile of blank images is one example
    rows = [row(i, ("train", "test")[i % 2], f"pixels {i // 2}") for i in range(500)]
    assert len(find_leaks(rows, forms([i // 2 for i in range(500)])).examples) == 20


def test_twelve_thousand_images_take_seconds() -> None:
    random = np.random.default_rng(0)
    centres = random.integers(0, 2**63, 600, dtype=np.uint64)
    flips = np.uint64(1) << random.integers(0, 64, (12_000, 8), dtype=np.uint64)
    hashes = centres[random.integers(0, 600, (12_000, 1))] ^ flips
    rows = [row(i, SPLITS[i % 4]) for i in range(12_000)]
    started = time.process_time()
    assert find_leaks(rows, hashes).near > 10_000
    assert time.process_time() - started < 6


def test_the_report_survives_storage_and_reads_as_a_table() -> None:
    rows = [row(0, "train", "same"), row(1, "test", "same", "b")]
    report = find_leaks(rows, forms([1, 1]))
    assert LeakReport.from_json(report.to_json()) == report
    assert LeakReport.model_validate(report.to_document()) == report
    assert report.table() == [
        ("all", 1, 1),
        ("train/test (splits)", 1, 1),
        ("a (class)", 1, 1),
        ("b (class)", 1, 1),
    ]
    with pytest.raises(InvalidDataset, match="damaged"):
        LeakReport.from_json(b"{}")


@pytest.mark.parametrize("distance", [-1, 64])
def test_a_distance_that_cannot_be_is_refused(distance: int) -> None:
    with pytest.raises(InvalidRequest, match="0 to 63"):
        find_leaks([row(0, "train")], forms([1]), distance)


def test_training_leaves_out_what_is_judged() -> None:
    rows = (
        row(0, "train", "p"),
        row(1, "train", "q"),
        row(2, "train", "p"),
        row(3, "calibration", "p"),
        row(4, "val", "r"),
        row(5, "test", "r"),
    )
    manifest = Manifest("zoo", ("a",), rows)
    assert exact_leaks(manifest) == ("p", "r")
    left_out = [manifest.rows[i] for i in leaked_rows(manifest, "train")]
    assert {row.pixel_hash for row in left_out} == {"p"}
    assert len(left_out) == 2
    clean = Manifest("zoo", ("a",), rows[1:2])
    assert leaked_rows(clean, "train").dtype == np.int64
    assert exact_leaks(clean) == ()


def test_a_stored_version_can_be_checked_again(objects: ObjectStore, pixels: Callable[..., NDArray[np.uint8]]) -> None:
    images: list[RawImage] = []
    for seed in range(12):
        image = pixels(seed)
        splits: tuple[Split, Split] = ("train", "test") if seed < 4 else ("train", "train")
        turned = (image, image[:, ::-1].copy())
        images += [
            # Of one group, pairs that both train stay together where val is carved.
            RawImage(encode_png(data), "ab"[seed % 2], split, "" if seed < 4 else f"{seed}", f"{seed}")
            for data, split in zip(turned, splits, strict=True)
        ]
    source = Source(("a", "b"), "zoo", "test", len(images), lambda: iter(images))
    built = build_dataset(source, objects)
    assert (built.leaks.exact, built.leaks.near) == (0, 8)
    assert load_leaks(objects, built.manifest.id) == built.leaks
    seen: list[tuple[str, int, int]] = []
    again = check_leaks(built.manifest, objects, progress=lambda *step: seen.append(step))
    assert again == built.leaks
    assert seen[-1] == ("looking for leaks", 24, 24)
    assert check_leaks(built.manifest, objects, distance=0).near == 8
    with pytest.raises(NotFound):
        load_leaks(objects, "0" * 64)
