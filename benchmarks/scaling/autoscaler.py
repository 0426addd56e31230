"""What a HorizontalPodAutoscaler does, as Kubernetes documents it ("Horizontal Pod Autoscaling", algorithm details and
scaling policies) and its controller does it (pkg/controller/podautoscaler).

Every sync, each metric proposes a number of pods, `ceil(pods × value / target)`, with what is known of each pod: pods
that are not ready, or too young for a figure of their own, count as idle when there would be more pods, and do not
count when there would be fewer; pods whose figure is missing count as idle in the one case and as being at their
target in the other. Neither may turn the direction round. The largest proposal is taken, held to the lowest of the
window for more pods and to the highest of the window for fewer, and then to what the policies allow in their periods.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["cpu", "queue-wait"]


@dataclass(frozen=True, slots=True)
class Policy:
    """At most `value` pods, or percent of them, within `period` seconds."""

    type: Literal["Pods", "Percent"]
    value: int
    period: float


@dataclass(frozen=True, slots=True)
class Rules:
    """One direction's behaviour; `window` in seconds, `tolerance` as a fraction of the target."""

    window: float
    policies: tuple[Policy, ...]
    select: Literal["Max", "Min", "Disabled"] = "Max"
    tolerance: float = 0.1


UP = Rules(0.0, (Policy("Pods", 4, 15.0), Policy("Percent", 100, 15.0)))
DOWN = Rules(300.0, (Policy("Percent", 100, 15.0),))
"""What holds where a manifest says nothing."""


@dataclass(frozen=True, slots=True)
class Metric:
    """`target` is the mean over pods: of `cpu` as a fraction of what a pod requests, of `queue-wait` in seconds."""

    kind: Kind
    target: float


@dataclass(frozen=True, slots=True)
class Settings:
    """What a HorizontalPodAutoscaler says."""

    minimum: int
    maximum: int
    metrics: tuple[Metric, ...]
    up: Rules = UP
    down: Rules = DOWN


@dataclass(frozen=True, slots=True)
class Reading:
    """What is known of one pod: its `value`, None where it is missing; `ignored` while it is pending, or not ready, or
    its figure is from before it was."""

    value: float | None = None
    ignored: bool = False


def proposed(metric: Metric, readings: Sequence[Reading], pods: int, settings: Settings) -> int | None:
    """How many pods `metric` asks for instead of `pods`; None where no pod's value is known."""
    values = [reading.value for reading in readings if not reading.ignored and reading.value is not None]
    missing = sum(not reading.ignored and reading.value is None for reading in readings)
    ignored = sum(reading.ignored for reading in readings)
    if not values:
        return None
    ratio = _mean(values) / metric.target
    if not missing and not (ignored and ratio > 1):
        return pods if _tolerated(ratio, settings) else math.ceil(_exact(ratio * len(values)))
    if ratio < 1:
        values += [_full(metric)] * missing
    else:
        values += [0.0] * (missing + ignored)
    corrected = _mean(values) / metric.target
    if _tolerated(corrected, settings) or (ratio < 1) != (corrected < 1):
        return pods
    wanted = math.ceil(_exact(corrected * len(values)))
    return pods if (corrected < 1) == (wanted > pods) else wanted


def _full(metric: Metric) -> float:
    """What a pod without a figure counts as when there would be fewer: all of its request, or the target."""
    return 1.0 if metric.kind == "cpu" else metric.target


def _tolerated(ratio: float, settings: Settings) -> bool:
    return 1 - settings.down.tolerance <= ratio <= 1 + settings.up.tolerance


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _exact(value: float) -> float:
    """Without the last digits of a float, which would make four pods of 3.0000000000000004."""
    return round(value, 9)


class Autoscaler:
    """One HorizontalPodAutoscaler over time; seconds on whatever clock the caller has."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._recommended: list[tuple[float, int]] = []
        self._changed: list[tuple[float, int]] = []

    def sync(self, now: float, pods: int, readings: Sequence[tuple[Metric, Sequence[Reading]]]) -> int:
        """How many pods there are to be from now on, instead of `pods`."""
        settings = self.settings
        if not self._recommended:  # as the controller begins: nothing shrinks before the window is over
            self._recommended.append((now, pods))
        if not settings.minimum <= pods <= settings.maximum:
            return self._change(now, pods, min(max(pods, settings.minimum), settings.maximum))
        proposals = [proposed(metric, known, pods, settings) for metric, known in readings]
        known = [proposal for proposal in proposals if proposal is not None]
        if not known or (len(known) < len(proposals) and max(known) < pods):
            return pods  # fewer only where every metric agrees
        steady = self._stabilised(now, pods, max(known))
        if steady > pods:
            return self._change(now, pods, max(pods, min(steady, settings.maximum, self._most(now, pods))))
        if steady < pods:
            return self._change(now, pods, min(pods, max(steady, settings.minimum, self._fewest(now, pods))))
        return pods

    def _stabilised(self, now: float, pods: int, wanted: int) -> int:
        up, down = self.settings.up.window, self.settings.down.window
        lowest = min([wanted, *(count for at, count in self._recommended if at > now - up)])
        highest = max([wanted, *(count for at, count in self._recommended if at > now - down)])
        self._recommended = [each for each in self._recommended if each[0] > now - max(up, down)]
        self._recommended.append((now, wanted))
        return min(max(pods, lowest), highest)

    def _before(self, now: float, pods: int, period: float) -> int:
        """How many pods there were `period` seconds ago."""
        return pods - sum(change for at, change in self._changed if at > now - period)

    def _most(self, now: float, pods: int) -> int:
        rules = self.settings.up
        if rules.select == "Disabled":
            return pods
        allowed = []
        for policy in rules.policies:
            before = self._before(now, pods, policy.period)
            grown = before + policy.value if policy.type == "Pods" else before * (1 + policy.value / 100)
            allowed.append(math.ceil(_exact(grown)))
        return min(allowed) if rules.select == "Min" else max(allowed)

    def _fewest(self, now: float, pods: int) -> int:
        rules = self.settings.down
        if rules.select == "Disabled":
            return pods
        allowed = []
        for policy in rules.policies:
            before = self._before(now, pods, policy.period)
            left = before - policy.value if policy.type == "Pods" else before * (1 - policy.value / 100)
            allowed.append(math.floor(_exact(left)))
        return max(allowed) if rules.select == "Min" else min(allowed)

    def _change(self, now: float, pods: int, wanted: int) -> int:
        if wanted != pods:
            longest = max(policy.period for policy in (*self.settings.up.policies, *self.settings.down.policies))
            self._changed = [each for each in self._changed if each[0] > now - longest]
            self._changed.append((now, wanted - pods))
        return wanted
