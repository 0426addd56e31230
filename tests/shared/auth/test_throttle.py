from types import SimpleNamespace

import pytest
from medloop.auth import throttle
from medloop.auth.throttle import Buckets, Failures
from medloop.errors import RateLimited


def test_a_bucket_fills_again_at_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(throttle, "time", SimpleNamespace(monotonic=lambda: now))
    buckets = Buckets()
    for _ in range(20):
        buckets.take("a", 20)
    with pytest.raises(RateLimited) as refused:
        buckets.take("a", 20)
    assert refused.value.retry_after == 1
    buckets.take("b", 20)
    now = 0.11
    buckets.take("a", 20)
    buckets.take("a", 20)
    with pytest.raises(RateLimited):
        buckets.take("a", 20)


def test_a_rate_below_one_says_how_long_to_wait() -> None:
    buckets = Buckets()
    buckets.take("a", 0.1)
    with pytest.raises(RateLimited) as refused:
        buckets.take("a", 0.1)
    assert refused.value.retry_after == 10


def test_memory_is_bounded_whoever_asks() -> None:
    buckets, failures = Buckets(), Failures()
    for number in range(throttle.ENTRIES + 100):
        buckets.take(str(number), 1)
        failures.add(str(number))
    assert len(buckets._buckets) == throttle.ENTRIES
    assert len(failures._counts) == throttle.ENTRIES
