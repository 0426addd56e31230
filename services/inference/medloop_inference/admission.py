"""Who is let in, and how much goes through the network at once.

`Admission` refuses at the door what could not be answered in time: a queue without bound only makes everybody late.
`Pace` finds the batch size: additive increase while answers come in time, multiplicative decrease when they do not
(AIMD; for serving, Crankshaw et al. 2017, Clipper).
"""

import math
from collections import deque
from collections.abc import Sequence

from medloop.errors import Overloaded

from medloop_inference.settings import QueueSettings

FIRST_GUESS_S = 0.005
"""An image, before one was timed: so that a burst right after the start is not let in whole."""
HEADROOM = 0.75
"""Of the target: what is let in is answered within all of it even when the next batches take longer than the last."""
_WEIGHT = 0.1  # of the newest batch in the moving average


class Admission:
    """Counts what waits. All but `ran` is called from the event loop's thread only."""

    def __init__(self, limits: QueueSettings) -> None:
        self._limits = limits
        self._target = limits.target_ms / 1000
        self.images = 0
        self.bytes = 0
        self.slow = 0  # of the images, those in slow lanes; written under the batcher's lock
        self.seconds_per_image = FIRST_GUESS_S
        self._timed = False

    @property
    def predicted_wait(self) -> float:
        """Seconds until the network would begin with an image that came now."""
        return max(0, self.images - self.slow) * self.seconds_per_image

    def check(self) -> None:
        """Raise Overloaded unless one more request can be answered in time. Somebody who comes alone always can."""
        wait = self.predicted_wait
        if self.images and wait > HEADROOM * self._target:
            raise Overloaded(
                f"{self.images} images wait already, about {wait:.1f} s of work; send this again later.",
                retry_after=max(1, math.ceil(wait - HEADROOM * self._target)),
            )
        if self.images >= self._limits.queue_images:
            raise Overloaded(f"{self.images} images wait already; send this again later.")

    def hold(self, size: int) -> None:
        """Account for `size` bytes of somebody's images; raises Overloaded when memory's bound is reached."""
        if self.bytes and self.bytes + size > self._limits.queue_bytes:
            raise Overloaded("The images that wait fill the memory set aside for them; send this again later.")
        self.bytes += size

    def release(self, size: int) -> None:
        self.bytes -= size

    def ran(self, images: int, seconds: float) -> None:
        """A batch took `seconds` of the network's time; called from the thread that ran it."""
        weight = _WEIGHT if self._timed else 1.0
        self._timed = True
        self.seconds_per_image += weight * (seconds / images - self.seconds_per_image)


class Pace:
    """The largest batch, kept so that the 95th percentile of latency stays within the target, and that one batch takes
    a tenth of it at most: whoever comes while one runs waits for its end."""

    SMALLEST, FIRST, LARGEST = 1, 8, 32
    _WINDOW = 64  # answers between two looks at the percentile
    _SHARE = 0.1  # of the target

    def __init__(self, target_ms: float) -> None:
        self._target = target_ms / 1000
        self._latencies: deque[float] = deque(maxlen=self._WINDOW)
        self._since = 0
        self._by_latency = self.FIRST
        self._image_s = 0.0  # moving average of the network's time

    @property
    def limit(self) -> int:
        """Images of a batch."""
        if not self._image_s:
            return self._by_latency
        return max(self.SMALLEST, min(self._by_latency, int(self._SHARE * self._target / self._image_s)))

    def ran(self, images: int, seconds: float) -> None:
        """A batch took `seconds` from its beginning to its end."""
        weight = _WEIGHT if self._image_s else 1.0
        self._image_s += weight * (seconds / images - self._image_s)

    def observe(self, latencies: Sequence[float]) -> None:
        """Learn from a batch: the seconds from acceptance to answer of each of its images."""
        if not latencies:
            return
        full = len(latencies) >= self.limit
        self._latencies.extend(latencies)
        self._since += len(latencies)
        whole = self._since >= self._WINDOW
        if not whole and not full:
            return
        late = sorted(self._latencies)[math.ceil(0.95 * len(self._latencies)) - 1] > self._target
        if whole:
            self._since = 0
        if late and whole:
            self._by_latency = max(self.SMALLEST, self._by_latency // 2)
            self._latencies.clear()  # those are the old size's
        elif full and not late:
            self._by_latency = min(self.LARGEST, self._by_latency + 1)
