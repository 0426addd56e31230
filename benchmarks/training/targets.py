"""What each figure is to reach."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """At least `bound`, or at most."""

    bound: float
    least: bool

    def __str__(self) -> str:
        return f"{'≥' if self.least else '≤'} {self.bound:g}"

    def met(self, value: float) -> bool:
        return value >= self.bound if self.least else value <= self.bound


def _least(bound: float) -> Target:
    return Target(bound, least=True)


def _most(bound: float) -> Target:
    return Target(bound, least=False)


_SCORES = {
    "pneumoniamnist": {"auc": 0.975, "accuracy": 0.91},
    "breastmnist": {"auc": 0.91, "accuracy": 0.87},
    "medical-mnist-12k": {"accuracy": 0.998},
    "bccd-cells_64": {"auc": 0.99},
}
TARGETS = {
    **{f"scores.{name}.{m}.mean": _least(bound) for name, found in _SCORES.items() for m, bound in found.items()},
    **{f"scores.{name}.dropped": _most(0) for name in _SCORES},
    **{f"scores.{name}.seconds.max": _most(600) for name in _SCORES},  # on two cores
    "ece.pneumoniamnist": _most(0.05),
    "ece.bccd-cells_64": _most(0.05),
    "epoch_over_compute": _most(1.05),
    "input_ratio.imagefolder_0workers": _least(10),
    "input_ratio.imagefolder_2workers": _least(5),
    "second_run_first_step_s": _most(3),
    "tracking_share": _most(0.01),
    "tracking_share_small": _most(0.01),
    "memory_ratio": _most(1.3),
    "memory_million_ratio": _most(1.1),  # flat, give or take what the kernel rounds
    "ddp2_over_single": _least(0.9),
    "ddp_train_loss_over_seeds": _most(1),  # within what another seed changes
    "ddp_val_loss_over_seeds": _most(1),
}
"""Of the test split: where the figures are those of `val`, none is held against them."""


def verdict(name: str, value: float) -> tuple[str, str]:
    """The target and whether it is met, both empty where there is none."""
    target = TARGETS.get(name)
    return ("", "") if target is None else (str(target), "met" if target.met(value) else "missed")
