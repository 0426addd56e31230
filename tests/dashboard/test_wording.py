"""Numbers and other people's words."""

import re
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from medloop.schemas import Estimate, ModelRef, Outlier, Prediction
from medloop_dashboard.wording import (
    figure,
    file_size,
    how_unlike,
    interval,
    listed,
    logged,
    moment,
    percent,
    plain,
    ruled_out,
    share_with_interval,
    timings,
    wilson,
)


@given(st.text())
def test_plain_leaves_no_punctuation_with_a_meaning_and_loses_no_word(text: str) -> None:
    shown = plain(text)
    unescaped = re.sub(r"\\([!-/:-@\[-`{-~])", "", shown)
    assert not re.search(r"[!-/:-@\[-`{-~]", unescaped)
    assert re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", shown).split() == text.split()


@pytest.mark.parametrize(
    ("fraction", "said"),
    [
        (0.0, "0.0 %"),
        (1.0, "100.0 %"),
        (0.9931, "99.3 %"),
        (0.99996, "> 99.9 %"),
        (0.00001, "< 0.1 %"),
        (0.5, "50.0 %"),
    ],
)
def test_percent_never_rounds_to_certainty(fraction: float, said: str) -> None:
    assert percent(fraction) == said


def test_shares_are_percent_and_other_metrics_plain_numbers() -> None:
    assert figure("accuracy", 0.98765) == "98.77 %"
    assert figure("auc", 0.98765) == "0.9877"
    assert interval("f1", Estimate(value=0.5, low=0.25, high=0.75, method="bootstrap")) == "25.00 % to 75.00 %"


def test_moments_are_told_in_utc() -> None:
    assert moment(datetime(2026, 3, 1, 0, 30, tzinfo=timezone(timedelta(hours=2)))) == "2026-02-28 22:30 UTC"
    assert moment(datetime(2026, 3, 1, 0, 30, tzinfo=UTC)) == "2026-03-01 00:30 UTC"


@pytest.mark.parametrize(
    ("size", "said"), [(0, "0 B"), (1536, "1.5 KiB"), (5 * 2**20, "5.0 MiB"), (2**40, "1024.0 GiB")]
)
def test_file_sizes(size: int, said: str) -> None:
    assert file_size(size) == said


def test_listed() -> None:
    assert [listed(words) for words in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]


def prediction(kept: list[str]) -> Prediction:
    ref: dict[str, Any] = {"name": "m", "version": "1", "run_id": "r", "dataset_id": "d", "bundle_digest": "b"}
    return Prediction(
        model=ModelRef(**ref),
        image_hash="a",
        label=kept[0],
        probabilities={"a": 0.6, "b": 0.3, "c": 0.1},
        prediction_set=kept,
        coverage=0.95,
        milliseconds={},
    )


def test_the_prediction_set_in_words() -> None:
    assert "every other class can be ruled out" in ruled_out(prediction(["a"]))
    assert ruled_out(prediction(["a", "b"])) == "At 95 % coverage the model cannot rule out: a and b."
    assert "undecided" in ruled_out(prediction(["a", "b", "c"]))


def test_timings() -> None:
    assert timings({"decode": 1.24, "network": 2.0, "total": 4.0}) == "4.0 ms (decode 1.2, network 2.0)"
    assert timings({"network": 2.0}) == "2.0 ms (network 2.0)"


def test_wilson_agrees_with_its_published_example_and_stays_in_bounds() -> None:
    # Newcombe 1998, table I: 81 of 263.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(44, 44)[1] == 1.0
    assert share_with_interval(81, 263) == "30.8 % (25.5 % to 36.6 %)"


def test_logged_metrics_come_with_their_interval_where_there_is_one() -> None:
    metrics = {"test_auc": 0.9, "test_auc_low": 0.8, "test_auc_high": 0.95, "test_accuracy": 0.5}
    assert logged(metrics, "test", "auc") == "0.9000 (0.8000 to 0.9500)"
    assert logged(metrics, "test", "accuracy") == "50.00 %"
    assert logged(metrics, "val", "auc") == "not evaluated"


@pytest.mark.parametrize(
    ("percentile", "said"), [(0.0, "0 %"), (97.0, "97 %"), (99.97, "> 99 %"), (100.0, "all of them")]
)
def test_how_unlike_never_rounds_to_all(percentile: float, said: str) -> None:
    words = how_unlike(Outlier(score=1.0, percentile=percentile, threshold=2.0))
    assert f"than {said}" in words
    assert "Too few" not in words
    assert "Too few" in how_unlike(Outlier(score=1.0, percentile=percentile, threshold=None))
