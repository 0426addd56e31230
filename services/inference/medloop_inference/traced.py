"""What a request's span says of its images, where traces are on: where their time went, and which version answered."""

from collections.abc import Sequence

from medloop import tracing
from medloop.bundle import Pixels

from medloop_inference.answer import Answer, Options
from medloop_inference.batcher import Outcome
from medloop_inference.predict import Predictor

_ANY = Options()
_TOTAL = "medloop.total_ms"


class TracedPredictor(Predictor):
    """Predicts, and notes each answer in the span of the request that it is for."""

    async def predict(self, image: bytes, options: Options = _ANY) -> Answer:
        answer = await super().predict(image, options)
        _note([answer])
        return answer

    async def predict_many(self, images: Sequence[bytes], options: Options = _ANY) -> list[Outcome]:
        outcomes = await super().predict_many(images, options)
        _note(outcomes)
        return outcomes

    async def predict_pixels(self, pixels: Pixels, options: Options = _ANY) -> list[Outcome]:
        outcomes = await super().predict_pixels(pixels, options)
        _note(outcomes)
        return outcomes


def _note(outcomes: Sequence[Outcome]) -> None:
    """Of a request's images the one that took longest is noted, which is what the request waited for; noting an answer
    twice changes nothing."""
    span = tracing.current.get()
    if span is None:
        return
    for outcome in outcomes:
        if not isinstance(outcome, Answer):
            continue
        spent, model = outcome.document["milliseconds"], outcome.document["model"]
        so_far = span.notes.get(_TOTAL)
        if isinstance(so_far, float) and so_far >= spent["total"]:
            continue
        span.notes |= {f"medloop.{stage}_ms": float(taken) for stage, taken in spent.items()}
        span.notes |= {f"medloop.model.{key}": str(model[key]) for key in ("name", "version", "engine", "precision")}
