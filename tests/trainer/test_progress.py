import io
import sys

import pytest
from medloop_trainer.progress import bars


def shown(monkeypatch: pytest.MonkeyPatch, forced: bool | None) -> str:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "80")
    with bars(forced) as progress:
        progress("training", 0, 40)
        progress("training", 30, 40)
        progress.note("training", "epoch 3/4")
        with progress.waiting("exporting"):
            pass
    return stream.getvalue()


def test_bars_say_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, True)
    for part in ("training", "30/40", "/s", "epoch 3/4", "exporting"):
        assert part in text


@pytest.mark.parametrize("forced", [None, False])
def test_without_a_terminal_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch, forced: bool | None) -> None:
    assert shown(monkeypatch, forced).strip() == ""
