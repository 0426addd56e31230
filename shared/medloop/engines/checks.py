"""How far an engine and precision may lie from what a version means, float32 on ONNX Runtime, and who has checked it.

Two checks, of two kinds of inputs. The bundle's *golden* inputs tell at every load that this machine computes what the
training's did. They are few, and part of them is noise, so that a label may turn on a difference of 1e-3; hence they
judge probabilities alone. The *calibration* split is real images: the evaluator answers it with both, which judges
labels too, and keeps its verdict as a record. Inference serves nothing but float32 on ONNX Runtime without one.
"""

import math
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version

import numpy as np
from numpy.typing import NDArray

from medloop.errors import InvalidRequest
from medloop.schemas import EngineCheck, EngineVerdict
from medloop.storage.records import RecordStore, scan

VERDICTS = "engine_checks"
"""The kind of the records."""
MAX_DIFFERENCE = {"float32": 1e-3, "bfloat16": 1e-2}
"""The largest |Δp| to float32 on ONNX Runtime, by precision."""
MIN_AGREEMENT = 0.999
"""The share of calibration images that must keep their label in a precision below float32."""
_DOUBT = 0.05
"""One minus the confidence of `disagreement_bound`."""


def compare(expected: NDArray[np.float32], found: NDArray[np.float32]) -> tuple[float, float]:
    """The largest |Δp|, and the share of equal labels, of probabilities f32 [N, K], N ≥ 1. NaN if one of them is."""
    difference = float(np.abs(found - expected).max())
    return difference, float((found.argmax(axis=1) == expected.argmax(axis=1)).mean())


def judge(check: EngineCheck) -> str | None:
    """Why a check on the calibration split does not pass, as one sentence; None when it does."""
    limit = MAX_DIFFERENCE[check.precision]
    if not check.max_difference <= limit:  # also where it is not a number
        return (
            f"Its probabilities differ by up to {check.max_difference:.1e} from those of float32 on ONNX Runtime; "
            f"{check.precision} may differ by {limit:.0e}."
        )
    if check.precision != "float32" and check.agreement < MIN_AGREEMENT:
        return f"Only {check.agreement:.2%} of {check.images:,} images keep their label; {MIN_AGREEMENT:.1%} must."
    return None


def engine_version(engine: str) -> str:
    """The installed version of the engine's package, which has the engine's name; raises InvalidRequest if there is
    none."""
    try:
        return package_version(engine)
    except PackageNotFoundError as exc:
        raise InvalidRequest(f"The package {engine} is not installed; install medloop with its extra.") from exc


def disagreement_bound(check: EngineCheck) -> float:
    """Below what share of such images the label changes, with 95 % confidence: the one-sided upper bound of Clopper
    and Pearson (1934), in (0, 1]. About 3 / n where none of n images changed its label."""
    changed = round((1 - check.agreement) * check.images)
    if changed >= check.images:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):  # bisection: the chance of so few changes falls as the share grows
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(changed, check.images, middle) > _DOUBT else (low, middle)
    return high


def _at_most(count: int, trials: int, share: float) -> float:
    """The chance that at most `count` of `trials` turn out so, `share` in (0, 1) of which do in the long run."""
    logs = (
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        + k * math.log(share) + (trials - k) * math.log1p(-share)
        for k in range(count + 1)
    )  # fmt: skip
    return math.fsum(map(math.exp, logs))


def find_check(
    records: RecordStore, model: str, version: str, digest: str, engine: str, precision: str
) -> EngineCheck | None:
    """What the evaluator found when it last checked this bundle with this engine, of the version that is installed
    here, and this precision; None where it has not, or where that did not pass."""
    wanted = (digest, engine, precision, engine_version(engine))
    for record in scan(records, VERDICTS, {"model": model, "version": version}):
        verdict = EngineVerdict.model_validate(record.document)
        found = (verdict.bundle_digest, verdict.check.engine, verdict.check.precision, verdict.engine_version)
        if found == wanted:
            return verdict.check if verdict.passed else None
    return None
