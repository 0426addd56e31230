"""What every engine gives: a network that answers, says by what, and can be held against its golden inputs."""

from abc import ABC, abstractmethod
from typing import ClassVar
from zipfile import BadZipFile

import numpy as np

from medloop.bundle import GOLDEN, MAX_PROBABILITY_DIFFERENCE, MODEL, Bundle, Golden, Outputs, Pixels
from medloop.engines.checks import MAX_DIFFERENCE, compare
from medloop.errors import UntrustedModel
from medloop.schemas import EngineCheck
from medloop.vision.prepare import prepare

REFERENCE_ENGINE, REFERENCE_PRECISION = "onnxruntime", "float32"
"""What a version means."""


class Network(ABC):
    """A bundle's network on one engine. `threads` bounds the threads of one run; several threads may call `run` at
    once."""

    engine: ClassVar[str]

    def __init__(self, bundle: Bundle, precision: str, threads: int) -> None:
        self.bundle, self.precision, self.threads = bundle, precision, threads

    @abstractmethod
    def run(self, images: Pixels) -> Outputs:
        """Answer for `images` uint8 [N, S, S, C], N ≥ 1, prepared with the bundle's spec. Raises the engine's own
        errors, none of which prepared images lead to."""

    def check_golden(self) -> EngineCheck:
        """Push the golden inputs through preparation and network.

        Raises UntrustedModel when a pixel differs at all, or a probability by more than 1e-4; by more than 1e-3 in
        float32 on another engine, or 1e-2 in a lower precision.
        """
        golden = self._golden()
        self._check_preparation(golden)
        try:
            answers = self.run(golden.prepared).probabilities
        except Exception as exc:  # engines share no narrower base: a network of other inputs or outputs than ours
            raise UntrustedModel(f"{MODEL} cannot answer the golden inputs: {exc}") from exc
        if answers.shape != golden.probabilities.shape:
            raise UntrustedModel(f"{MODEL} answers with {answers.shape}, not {golden.probabilities.shape}.")
        difference, agreement = compare(golden.probabilities, answers)
        is_reference = (self.engine, self.precision) == (REFERENCE_ENGINE, REFERENCE_PRECISION)
        limit = MAX_PROBABILITY_DIFFERENCE if is_reference else MAX_DIFFERENCE[self.precision]
        if not difference <= limit:  # also where it is not a number
            raise UntrustedModel(
                f"The network's answers to the golden inputs are off by {difference:.1e} with {self.engine} in "
                f"{self.precision} (at most {limit:.0e} is allowed)."
            )
        return EngineCheck(
            engine=self.engine,
            precision=self.precision,
            source="golden",
            images=len(answers),
            max_difference=difference,
            agreement=agreement,
        )

    def _golden(self) -> Golden:
        try:
            golden = self.bundle.golden
        except (OSError, ValueError, KeyError, BadZipFile) as exc:
            raise UntrustedModel(f"{GOLDEN} cannot be read: {exc}; register the version again.") from exc
        if not golden.encoded or not len(golden.prepared) or len(golden.encoded) != len(golden.pixels):
            raise UntrustedModel(f"{GOLDEN} holds too little to check anything; register the version again.")
        return golden

    def _check_preparation(self, golden: Golden) -> None:
        spec = self.bundle.card.preparation
        for number, (data, expected) in enumerate(zip(golden.encoded, golden.pixels, strict=True)):
            if not np.array_equal(prepare(data, spec), expected):
                raise UntrustedModel(
                    f"Golden image {number} comes out of preparation with other pixels than in training: "
                    "install the locked versions of Pillow and NumPy."
                )
