from dataclasses import fields

from medloop_trainer.curves import curves_png, epoch_metrics
from medloop_trainer.loop import Epoch
from medloop_trainer.scores import Scores

FIRST = Epoch(1, 1.5, Scores(1.2, 0.5, 0.7), 1.1, 3e-3, 400.0)
SECOND = Epoch(2, 0.9, Scores(0.8, 0.75, None), 0.7, 1e-5, 410.0)


def test_every_number_of_an_epoch_is_a_metric_but_what_is_not_known() -> None:
    metrics = epoch_metrics(FIRST)
    expected = {
        "train_loss": 1.5,
        "val_loss": 1.2,
        "val_accuracy": 0.5,
        "val_auc": 0.7,
        "judged_by": 1.1,
        "learning_rate": 3e-3,
        "images_per_second": 400.0,
    }
    assert expected.items() <= metrics.items()
    assert metrics.keys() == expected.keys() | {field.name for field in fields(Epoch)} - {"number", "val"}
    assert "val_auc" not in epoch_metrics(SECOND)


def test_curves_are_a_png() -> None:
    assert curves_png([FIRST, SECOND]).startswith(b"\x89PNG")
