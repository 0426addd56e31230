"""An attribution's quality in words."""

from medloop_dashboard.quality import quality_lines


def test_every_figure_is_told() -> None:
    figures = {"completeness_gap": 0.0123, "deletion": 0.3, "random_deletion": 0.6, "faithfulness": 0.3, "novel": 0.5}
    figures["background_images"] = 32.0
    completeness, faithfulness, background, other = quality_lines(figures)
    assert "1.23 %" in completeness
    assert "30.0 %" in faithfulness
    assert "60.0 %" in faithfulness
    assert "does matter" in faithfulness
    assert background == "Measured against 32 training images."
    assert other == "Novel: 0.5000"


def test_an_overlay_no_better_than_chance_is_called_so() -> None:
    for named in (0.6, 0.7):
        (line,) = quality_lines({"deletion": named, "random_deletion": 0.6})
        assert "do not rely on this overlay" in line


def test_nothing_is_made_up() -> None:
    assert quality_lines({}) == []
