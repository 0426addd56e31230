"""The gate: is the challenger significantly worse than the champion on the same frozen test images?

Both answer the test split of the challenger's data set version. The test looks at images that only one of them gets
right. Without groups it is McNemar's exact test (McNemar 1947), one-sided at α = 0.05; where images come in groups,
whole groups change sides under the null hypothesis, of which McNemar's is the case of one image a group. There is no
margin: the gate fails on evidence that the challenger is worse, and passes otherwise, so a pass on a small test split
says little; the interval of the difference in the decision says how little.

With k groups that favour one side p cannot fall below 2^-k, so with four or fewer no evidence could ever suffice, and
those few may hold most of the images. Then a challenger that is behind fails, and a person decides.
"""

from collections.abc import Callable
from uuid import NAMESPACE_URL, uuid5

import numpy as np
from medloop.data.manifest import load_manifest
from medloop.registry import Version, fetch_bundle
from medloop.schemas import GateDecision
from medloop.storage.records import RecordStore
from numpy.typing import NDArray

from medloop_evaluator.evaluate import Evaluator
from medloop_evaluator.resample import Integers, Resampling, clusters, degenerate, newcombe, percentile, wilson

ALPHA = 0.05
KIND = "gate_decisions"


class Gate:
    """Decides once for each pair of bundles and data set version, and keeps the decision."""

    def __init__(self, evaluator: Evaluator, records: RecordStore) -> None:
        self.evaluator = evaluator
        self.records = records

    def decide(self, challenger: Version, champion: Version | None) -> GateDecision:
        """The decision on record, or a new one. Raises UntrustedModel when a bundle is not the registered one."""
        evaluator = self.evaluator
        bundle = fetch_bundle(evaluator.registry, challenger, evaluator.home.bundles_dir)
        dataset_id = bundle.card.dataset_id
        if champion is None:
            return self._keep(_decision_id(bundle.digest, "", dataset_id), lambda: _no_champion(challenger, dataset_id))
        old = fetch_bundle(evaluator.registry, champion, evaluator.home.bundles_dir)

        def compare() -> GateDecision:
            manifest = load_manifest(evaluator.objects, dataset_id)
            # Both in the order of the manifest's rows, so that images pair up.
            answers = [evaluator.answers(b, manifest, "test", lambda *_: None) for b in (bundle, old)]
            right = [a.called_rightly(manifest, b.card.classes) for a, b in zip(answers, (bundle, old), strict=True)]
            rows = [manifest.rows[row] for row in answers[0].rows]
            figures = compare_paired(right[0], right[1], clusters([row.group for row in rows]))
            return _judged(challenger, champion, dataset_id, figures)

        return self._keep(_decision_id(bundle.digest, old.digest, dataset_id), compare)

    def read(self, decision_id: str) -> GateDecision | None:
        record = self.records.get(KIND, decision_id)
        return GateDecision.model_validate(record.document) if record else None

    def _keep(self, decision_id: str, make: Callable[[], GateDecision]) -> GateDecision:
        if (known := self.read(decision_id)) is not None:
            return known
        decision = make().model_copy(update={"id": decision_id})
        self.records.put_once(KIND, decision_id, decision.model_dump(mode="json"))
        # Another replica may have decided in between: the one on record counts.
        return self.read(decision_id) or decision


def compare_paired(
    challenger: NDArray[np.bool_], champion: NDArray[np.bool_], groups: Integers | None
) -> dict[str, float]:
    """Figures of the comparison of two versions' correctness, bool [N], on the same images.

    `difference` is challenger − champion in accuracy with its 95 % interval; `p_worse` is the one-sided p-value of
    "the challenger is not worse". `groups` counts groups (images where they do not come in groups),
    `informative_groups` those that favour one side, and `smallest_p` is the least `p_worse` that so many can give.
    """
    difference: Integers = challenger.astype(np.int64) - champion.astype(np.int64)
    low, high = _interval(challenger, champion, groups)
    by_group = difference if groups is None else np.bincount(groups, difference).astype(np.int64)
    informative = int((by_group != 0).sum())
    return {
        "images": float(len(difference)),
        "challenger_accuracy": float(challenger.mean()),
        "champion_accuracy": float(champion.mean()),
        "only_challenger_right": float((difference > 0).sum()),
        "only_champion_right": float((difference < 0).sum()),
        "difference": float(difference.mean()),
        "difference_low": low,
        "difference_high": high,
        "p_worse": sign_flip_p(by_group),
        "groups": float(len(by_group)),
        "informative_groups": float(informative),
        "smallest_p": 2.0**-informative,
    }


def _interval(
    challenger: NDArray[np.bool_], champion: NDArray[np.bool_], groups: Integers | None
) -> tuple[float, float]:
    """The 95 % interval of the difference in accuracy: Newcombe's of paired proportions, or the cluster bootstrap's.

    Where all groups differ alike, the bootstrap has no width; then as much either way as none in so many groups allows.
    """
    if groups is None:
        pairs = [challenger & champion, challenger & ~champion, ~challenger & champion, ~challenger & ~champion]
        return newcombe(*(int(pair.sum()) for pair in pairs))
    count = int(groups.max()) + 1
    if count == 1:
        return -1.0, 1.0  # one group says nothing about how groups differ
    difference: Integers = challenger.astype(np.int64) - champion.astype(np.int64)
    blocks = Resampling(np.zeros_like(groups), groups).blocks()
    low, high = percentile(np.concatenate([w @ difference / w.sum(axis=1) for w in blocks]))
    if not degenerate(low, high):
        return low, high
    reach = wilson(0, count)[1]
    return max(-1.0, low - reach), min(1.0, high + reach)


def cannot_tell(figures: dict[str, float]) -> bool:
    """Whether no result of the test could be significant: too few groups favour one side.

    Images that do not come in groups all count: four of them at most is a small loss, unless there are no more.
    """
    grouped = figures["groups"] < figures["images"]
    least = figures["smallest_p"] if grouped else 0.5 ** figures["images"]
    return bool(least >= ALPHA)


def sign_flip_p(differences: Integers) -> float:
    """P(Σ ±d ≤ Σ d) when every sign is a fair coin: exact, by convolving one d after another.

    With all d in {−1, 0, 1} it is the one-sided exact McNemar test: P(X ≤ b) for X binomial(b + c, ½).
    """
    magnitudes = np.abs(differences[differences != 0])
    reach = int(magnitudes.sum())
    chances = np.zeros(2 * reach + 1)  # of sums −reach … reach
    chances[reach] = 1.0
    for step in magnitudes:
        spread = np.zeros_like(chances)
        spread[step:] += chances[:-step] / 2
        spread[:-step] += chances[step:] / 2
        chances = spread
    return float(min(1.0, chances[: reach + int(differences.sum()) + 1].sum()))


def _decision_id(challenger_digest: str, champion_digest: str, dataset_id: str) -> str:
    return str(uuid5(NAMESPACE_URL, f"urn:medloop:gate:{challenger_digest}:{champion_digest}:{dataset_id}"))


def _no_champion(challenger: Version, dataset_id: str) -> GateDecision:
    return GateDecision(
        model=challenger.model,
        challenger=challenger.version,
        champion=None,
        dataset_id=dataset_id,
        outcome="no-champion",
        reason=f"{challenger.model} has no champion yet, so there is nothing to compare version "
        f"{challenger.version} with.",
    )


def _judged(challenger: Version, champion: Version, dataset_id: str, figures: dict[str, float]) -> GateDecision:
    worse = figures["p_worse"] < ALPHA
    untold = figures["difference"] < 0 and cannot_tell(figures)
    unit = "groups" if figures["groups"] < figures["images"] else "images"
    if untold:
        finding = (
            f"Whether version {challenger.version} is worse than champion {champion.version} cannot be told with so "
            f"few {unit}, so a person must decide"
        )
    else:
        finding = (
            f"Version {challenger.version} is {'' if worse else 'not '}significantly worse than champion "
            f"{champion.version}"
        )
    reason = (
        f"{finding}: accuracy {figures['challenger_accuracy']:.4f} against "
        f"{figures['champion_accuracy']:.4f} on {figures['images']:.0f} test images, difference "
        f"{figures['difference']:+.4f} (95 % interval {figures['difference_low']:+.4f} to "
        f"{figures['difference_high']:+.4f}), p = {figures['p_worse']:.3g}; "
        f"{figures['informative_groups']:.0f} of {figures['groups']:.0f} {unit} favour one of them, with which p "
        f"can be {figures['smallest_p']:.3g} at the least."
    )
    return GateDecision(
        model=challenger.model,
        challenger=challenger.version,
        champion=champion.version,
        dataset_id=dataset_id,
        outcome="fail" if worse or untold else "pass",
        reason=reason,
        figures=figures,
    )
