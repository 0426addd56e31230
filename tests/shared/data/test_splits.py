"""What holds for every assignment of splits, whatever the data set looks like."""

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from medloop.data.manifest import SPLITS, Manifest, Row, Split
from medloop.data.splits import FRACTIONS, SplitItem, assign_splits, split_named

CLASSES = ("a", "b", "c")


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def singles(count: int, label: str = "a", prefix: str = "") -> list[SplitItem]:
    return [SplitItem(sha(f"{prefix}{label}{i}"), label) for i in range(count)]


def version(items: Sequence[SplitItem], splits: Sequence[Split]) -> Manifest:
    rows = (
        Row(sha(f"{i}"), item.pixel_hash, item.label, split, item.group)
        for i, (item, split) in enumerate(zip(items, splits, strict=True))
    )
    return Manifest("zoo", CLASSES, tuple(rows))


def items_of(given_splits: st.SearchStrategy[Split | None]) -> st.SearchStrategy[list[SplitItem]]:
    """Data sets with many equal pixels and shared groups."""
    item = st.builds(
        SplitItem,
        pixel_hash=st.integers(0, 30).map(str),
        label=st.sampled_from(CLASSES),
        group=st.integers(0, 12).map(lambda i: f"g{i}" if i else ""),
        given=given_splits,
    )
    return st.lists(item, min_size=1, max_size=60)


UNSPLIT = items_of(st.none())
GIVEN = items_of(st.sampled_from(SPLITS))
MIXED = items_of(st.sampled_from((*SPLITS, None)))
PARTLY = st.sampled_from(
    [("train",), ("train", "val"), ("train", "test"), SPLITS[:2], ("train", "val", "test")]
).flatmap(lambda names: items_of(st.sampled_from(names)))


def assert_whole(items: Sequence[SplitItem], splits: Sequence[Split]) -> None:
    places: dict[tuple[str, str], set[Split]] = defaultdict(set)
    for item, split in zip(items, splits, strict=True):
        places["pixels", item.pixel_hash].add(split)
        if item.group:
            places["group", item.group].add(split)
    assert {key: where for key, where in places.items() if len(where) > 1} == {}


@given(UNSPLIT)
def test_equal_pixels_and_groups_stay_together(items: list[SplitItem]) -> None:
    splits = assign_splits(items)
    assert set(splits) <= set(SPLITS)
    assert_whole(items, splits)


@given(MIXED, st.randoms(use_true_random=False))
def test_the_order_of_the_images_does_not_matter(items: list[SplitItem], shuffle: random.Random) -> None:
    order = list(range(len(items)))
    shuffle.shuffle(order)
    splits = assign_splits(items)
    assert assign_splits([items[i] for i in order]) == tuple(splits[i] for i in order)


@given(st.one_of(MIXED, PARTLY, UNSPLIT))
@settings(max_examples=300)
def test_building_the_same_data_again_moves_nothing(items: list[SplitItem]) -> None:
    splits = assign_splits(items)
    assert assign_splits(items, version(items, splits)) == splits


@given(GIVEN)
def test_given_splits_are_kept(items: list[SplitItem]) -> None:
    present = {item.given for item in items}
    for item, split in zip(items, assign_splits(items), strict=True):
        allowed = {item.given}
        if item.given == "val" and "calibration" not in present:
            allowed |= {"calibration"}
        if item.given == "train":
            allowed |= set(SPLITS) - present - ({"calibration"} if "val" in present else set())
        assert split in allowed


JOINED = (
    [SplitItem("0", "a", "g1"), SplitItem("0", "a", "g2"), SplitItem("1", "a", "g3")],
    [SplitItem("0", "a", "g1"), SplitItem("0", "a", "g3"), SplitItem("1", "a", "g2")],
)
"""A new image joins the old groups g1 (train) and g3 (test); g2, which only g1 leads to, must stay in train."""


@given(UNSPLIT, UNSPLIT)
@example(*JOINED)
def test_later_versions_move_no_old_image_and_keep_new_ones_whole(old: list[SplitItem], fresh: list[SplitItem]) -> None:
    before = assign_splits(old)
    # New images share groups with old ones, not pixels.
    new = [SplitItem("new " + item.pixel_hash, item.label, item.group) for item in fresh]
    after = assign_splits([*old, *new], version(old, before))
    assert after[: len(old)] == before
    strangers = [SplitItem(item.pixel_hash, item.label, f"new {item.group}") for item in new]
    assert_whole(strangers, assign_splits([*old, *strangers], version(old, before))[len(old) :])
    home = {item.group: split for item, split in zip(old, before, strict=True) if item.group}
    for item, split in zip(new, after[len(old) :], strict=True):
        if split == "test" and "test" in before:
            # Frozen: only what belongs there by its group, or by its pixels to an image whose group does.
            mates = {mate.group for mate in new if mate.pixel_hash == item.pixel_hash} | {item.group}
            assert _reaches_test(mates, new, home)


def _reaches_test(groups: set[str], items: Sequence[SplitItem], home: dict[str, Split]) -> bool:
    """Whether shared groups and pixels lead from `groups` to one that stands in test."""
    groups = groups - {""}
    while True:
        if any(home.get(group) == "test" for group in groups):
            return True
        pixels = {item.pixel_hash for item in items if item.group in groups}
        wider = {item.group for item in items if item.pixel_hash in pixels} - {""}
        if wider <= groups:
            return False
        groups |= wider


@pytest.mark.parametrize("count", [4, 5, 10, 37, 200, 2000])
def test_fractions_are_met_in_each_class(count: int) -> None:
    items = [*singles(count, "a"), *singles(3 * count, "b")]
    splits = assign_splits(items)
    for label, images in (("a", count), ("b", 3 * count)):
        found = Counter(split for item, split in zip(items, splits, strict=True) if item.label == label)
        assert set(found) == set(SPLITS)
        for split in SPLITS:
            assert abs(found[split] - FRACTIONS[split] * images) <= 2


@given(st.lists(st.integers(1, 30), min_size=4, max_size=40))
def test_with_groups_fractions_are_met_to_within_the_largest_ones(sizes: list[int]) -> None:
    items = [SplitItem(f"{g} {i}", "a", f"group {g}") for g, size in enumerate(sizes) for i in range(size)]
    found = Counter(assign_splits(items))
    assert set(found) == set(SPLITS)
    for split in SPLITS:
        assert abs(found[split] - FRACTIONS[split] * sum(sizes)) <= 4 * max(sizes)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, {"train"}), (2, {"train", "test"}), (3, {"train", "test", "val"}), (4, set(SPLITS))],
)
def test_a_class_of_few_images_fills_the_splits_it_can(count: int, expected: set[str]) -> None:
    assert set(assign_splits(singles(count))) == expected


def given_as(split: Split, count: int) -> list[SplitItem]:
    return [SplitItem(item.pixel_hash, "a", "", split) for item in singles(count, prefix=split)]


def test_half_of_a_given_val_becomes_calibration() -> None:
    splits = Counter(assign_splits([*given_as("train", 100), *given_as("val", 40), *given_as("test", 30)]))
    assert splits == {"train": 100, "val": 20, "calibration": 20, "test": 30}


def test_without_val_it_is_carved_from_train() -> None:
    splits = Counter(assign_splits([*given_as("train", 850), *given_as("test", 150)]))
    assert splits["test"] == 150
    assert abs(splits["val"] - 100) <= 1
    assert abs(splits["calibration"] - 50) <= 1


def test_without_test_it_is_carved_from_train() -> None:
    splits = Counter(assign_splits([*given_as("train", 850), *given_as("val", 100)]))
    assert splits["val"] == splits["calibration"] == 50
    assert abs(splits["test"] - 150) <= 1


def test_given_duplicates_across_splits_stay_where_they_are() -> None:
    items = [SplitItem("same", "a", "", "train"), SplitItem("same", "a", "", "test"), *given_as("val", 4)]
    assert assign_splits(items)[:2] == ("train", "test")


def test_the_test_split_is_frozen_for_the_lineage() -> None:
    old = singles(100)
    before = assign_splits(old)
    after = assign_splits([*old, *singles(300, prefix="new")], version(old, before))
    assert after[:100] == before
    new = Counter(after[100:])
    assert new["test"] == 0
    assert new["train"] > new["val"] > new["calibration"] > 0


def test_single_additions_keep_the_proportions() -> None:
    items = singles(40)
    splits = assign_splits(items)
    for extra in singles(60, prefix="new"):
        grown = [*items, extra]
        splits = assign_splits(grown, version(items, splits))
        items = grown
    found = Counter(splits)
    assert abs(found["val"] / (100 - found["test"]) - 0.10 / 0.85) < 0.03


def test_an_image_seen_before_does_not_leave_test() -> None:
    old = singles(50)
    before = assign_splits(old)
    renamed = [SplitItem(item.pixel_hash, item.label, "", "train") for item in old]
    assert assign_splits(renamed, version(old, before)) == before


def test_unsplit_images_follow_given_ones() -> None:
    items = [
        *given_as("train", 10),
        *given_as("val", 4),
        SplitItem("p", "a", "patient", "test"),
        SplitItem("p", "a", "other"),
        SplitItem("q", "a", "patient"),
        SplitItem("r", "a", "other"),
        SplitItem("s", "a"),
    ]
    assert assign_splits(items)[-5:] == ("test", "test", "test", "test", "train")


@pytest.mark.parametrize(
    ("name", "split"), [("Training", "train"), ("valid", "val"), (" TEST ", "test"), ("holdout", None), ("", None)]
)
def test_names_of_splits(name: str, split: str | None) -> None:
    assert split_named(name) == split
