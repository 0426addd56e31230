"""What people would be told about a split: prediction sets and referrals.

Sets and decisions come from the rules that inference answers with (`medloop.bundle`, `medloop.outliers`), applied to
the answers of the version itself, float32 on ONNX Runtime. Coverage and the accuracy of what is accepted are figures of
selective classification (Geifman & El-Yaniv 2017) with split conformal sets (Vovk et al. 2005).
"""

import numpy as np
from medloop.bundle import Bundle, prediction_set
from medloop.outliers import OutlierModel, decide
from medloop.schemas import Estimate, Outlier, ReferReason, ServedReport
from numpy.typing import NDArray

from medloop_evaluator.answers import Answers
from medloop_evaluator.metrics import Scorer
from medloop_evaluator.resample import Resampling, means


def make_served(answers: Answers, scorer: Scorer, bundle: Bundle, resampling: Resampling) -> ServedReport:
    """Coverage, sizes of sets, referrals and what they are worth; `scorer` holds the same answers beside the labels.

    Raises UntrustedModel when the bundle's outlier statistics cannot be read.
    """
    classes, conformal = bundle.card.classes, bundle.card.conformal
    outliers = OutlierModel.load(bundle)
    sets = [prediction_set(probabilities, bundle.card) for probabilities in answers.probabilities]
    decisions = [decide(*told) for told in zip(sets, _judged(answers, outliers), strict=True)]
    covered = np.array([classes[k] in chosen for k, chosen in zip(scorer.labels, sets, strict=True)])
    sizes = np.array([len(chosen) for chosen in sets])
    referred = np.array([decision == "refer" for decision, _ in decisions])
    everywhere = np.ones_like(referred)
    # Without a threshold nothing could be beyond it: a rate of 0 would say that nothing was.
    told_apart = outliers is not None and outliers.threshold is not None
    reasons: list[ReferReason] = ["ambiguous", "unlike-training"] if told_apart else ["ambiguous"]
    columns: dict[str, tuple[NDArray[np.bool_ | np.float64], NDArray[np.bool_]]] = {
        "coverage": (covered, everywhere),
        "set_size": ((sizes - 1) / (len(classes) - 1), everywhere),  # of 1 to K
        "referred": (referred, everywhere),
        **{
            f"referred_{reason.replace('-', '_')}": (np.array([reason in why for _, why in decisions]), everywhere)
            for reason in reasons
        },
        "accepted_accuracy": (scorer.correct, ~referred),
        "referred_accuracy": (scorer.correct, referred),
    }
    figures = means(columns, resampling)
    figures["set_size"] = _of_classes(figures["set_size"], len(classes))
    return ServedReport(
        nominal_coverage=conformal.coverage,
        calibration_images=conformal.images,
        figures=figures,
        class_coverage=means({name: (covered, scorer.labels == k) for k, name in enumerate(classes)}, resampling),
        set_sizes=np.bincount(sizes, minlength=len(classes) + 1).tolist(),
    )


def _judged(answers: Answers, outliers: OutlierModel | None) -> list[Outlier] | list[None]:
    if outliers is None or answers.outlier_scores is None:
        return [None] * len(answers.rows)
    return outliers.place(answers.outlier_scores)


def _of_classes(share: Estimate, classes: int) -> Estimate:
    """0 to 1 as 1 to so many classes: a set is never empty."""
    value, low, high = (1 + (classes - 1) * end for end in (share.value, share.low, share.high))
    return Estimate(value=value, low=low, high=high, method=share.method)
