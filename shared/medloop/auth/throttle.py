"""How often one caller may ask, with bounded memory.

Both tables live in one process and are used from its event loop only; a caller of several replicas has its rate with
each.
"""

import math
import time
from collections import OrderedDict
from dataclasses import dataclass

from medloop.errors import RateLimited

ENTRIES = 4096
"""More callers than this in a minute, and the one that was quiet longest is forgotten."""
FAILURES_PER_MINUTE = 20


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float


class Buckets:
    """A token bucket for each caller (Turner 1986): `rate` requests a second, and one second's worth at once."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def take(self, caller: str, rate: float) -> None:
        """Raise RateLimited when `caller` has asked too often."""
        at = time.monotonic()
        most = max(1.0, rate)
        bucket = self._buckets.get(caller)
        if bucket is None:
            bucket = self._buckets[caller] = _Bucket(most, at)
            if len(self._buckets) > ENTRIES:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(caller)
        bucket.tokens = min(most, bucket.tokens + (at - bucket.at) * rate)
        bucket.at = at
        if bucket.tokens < 1:
            wait = math.ceil((1 - bucket.tokens) / rate)
            raise RateLimited(f"More than {rate:g} requests a second; wait {wait} s.", retry_after=max(1, wait))
        bucket.tokens -= 1


class Failures:
    """Wrong credentials by address. Only further wrong ones are refused for it: behind a proxy all callers share an
    address, and nobody may be locked out by a neighbour."""

    def __init__(self) -> None:
        self._counts: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def add(self, address: str) -> None:
        """Raise RateLimited at more than `FAILURES_PER_MINUTE`."""
        at = time.monotonic()
        began, count = self._counts.get(address, (at, 0))
        if at - began >= 60:
            began, count = at, 0
        self._counts[address] = (began, count + 1)
        self._counts.move_to_end(address)
        if len(self._counts) > ENTRIES:
            self._counts.popitem(last=False)
        if count >= FAILURES_PER_MINUTE:
            wait = math.ceil(began + 60 - at)
            raise RateLimited(f"Too many wrong credentials; wait {wait} s.", retry_after=max(1, wait))
