"""Each answer belongs to its image, is what the network says, and does not depend on what else was asked."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from medloop.bundle import Bundle
from medloop.errors import InvalidImage, MedLoopError
from medloop.schemas import Approval, Prediction
from medloop.testing import tiny_bundle, tiny_probabilities
from medloop_inference.champion import Served, load
from medloop_inference.predict import CHUNK, Predictor

pytestmark = pytest.mark.anyio
Grey = Callable[..., bytes]


def served_from(bundle: Bundle) -> Served:
    approval = Approval(
        sequence=1,
        action="approve",
        model="tiny",
        version="7",
        bundle_digest=bundle.digest,
        decision_id="",
        approver="a",
        key_id="",
    )
    return load(bundle, approval, threads=1)


@pytest.fixture(scope="session")
def served(first: Bundle) -> Served:
    return served_from(first)


def expected(level: int, **options: Any) -> Any:
    return tiny_probabilities(np.full((16, 16, 1), level, np.uint8), **options)


@pytest.mark.parametrize("level", [0, 100, 128, 255])
async def test_an_answer_is_what_the_network_says(served: Served, grey: Grey, level: int) -> None:
    image = grey(level)
    answer = await Predictor(2).predict(served, image)
    assert list(answer.probabilities.values()) == pytest.approx(expected(level), abs=1e-6)
    assert answer.label == ("bright" if level > 127 else "dark")
    assert answer.image_hash == hashlib.sha256(image).hexdigest()
    assert answer.model == served.ref
    assert answer.coverage == 0.95
    assert sum(answer.probabilities.values()) == pytest.approx(1)


async def test_the_prediction_set_holds_what_cannot_be_ruled_out(served: Served, grey: Grey) -> None:
    # The threshold 0.95 keeps every class of probability 0.05 or more.
    answers = [await Predictor(1).predict(served, grey(level)) for level in (120, 255)]
    assert [answer.prediction_set for answer in answers] == [["dark", "bright"], ["bright"]]


async def test_the_stages_are_timed(served: Served, grey: Grey) -> None:
    seen: dict[str, float] = {}
    answer = await Predictor(1, seen.__setitem__).predict(served, grey(10))
    spent = answer.milliseconds
    assert list(spent) == ["decode", "queue", "network", "total"]
    assert spent["total"] >= spent["decode"] + spent["queue"] + spent["network"] - 0.01
    assert seen == pytest.approx({stage: spent[stage] / 1000 for stage in seen}, abs=1e-6)
    assert set(seen) == {"decode", "queue", "network"}


async def test_many_are_answered_in_order_beyond_one_chunk(served: Served, grey: Grey) -> None:
    levels = [(37 * i) % 256 for i in range(2 * CHUNK + 5)]
    answers = await Predictor(2).predict_many(served, [grey(level) for level in levels])
    for level, answer in zip(levels, answers, strict=True):
        assert isinstance(answer, Prediction)
        assert list(answer.probabilities.values()) == pytest.approx(expected(level), abs=1e-6)
    assert len({answer.id for answer in answers if isinstance(answer, Prediction)}) == len(levels)


async def test_a_batch_answers_as_single_requests_do(served: Served, grey: Grey) -> None:
    images = [grey(level, size) for level, size in ((3, 16), (90, 40), (200, 7))]
    predictor = Predictor(2)
    batch = await predictor.predict_many(served, images)
    for image, answer in zip(images, batch, strict=True):
        single = await predictor.predict(served, image)
        assert isinstance(answer, Prediction)
        assert list(answer.probabilities.values()) == pytest.approx(list(single.probabilities.values()), abs=1e-6)


async def test_a_poisoned_item_fails_alone(served: Served, grey: Grey) -> None:
    answers = await Predictor(2).predict_many(served, [grey(0), b"poison", grey(255)])
    assert [type(answer) for answer in answers][::2] == [Prediction, Prediction]
    assert isinstance(answers[1], MedLoopError)
    assert [answers[i].label for i in (0, 2)] == ["dark", "bright"]  # type: ignore[union-attr]


async def test_only_poison_needs_no_network(served: Served) -> None:
    answers = await Predictor(2).predict_many(served, [b"", b"poison"])
    assert all(isinstance(answer, MedLoopError) for answer in answers)
    with pytest.raises(InvalidImage):
        await Predictor(2).predict(served, b"")


async def test_classes_are_named_in_the_card_s_order(tmp_path: Any, grey: Grey) -> None:
    served = served_from(tiny_bundle(tmp_path / "three", classes=("a", "b", "c")))
    answer = await Predictor(1).predict(served, grey(255))
    assert list(answer.probabilities) == ["a", "b", "c"]
    assert list(answer.probabilities.values()) == pytest.approx(expected(255, classes=3), abs=1e-6)
    assert answer.label == "c"
