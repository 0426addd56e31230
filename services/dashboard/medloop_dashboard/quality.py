"""What an attribution's quality figures say, in words."""

from collections.abc import Mapping

from medloop_dashboard.wording import percent

METHOD_NAMES = {"integrated-gradients": "Integrated Gradients", "shap": "SHAP (expected gradients)"}
QUALITY_NAMES = {
    "completeness_gap": "Completeness gap (0 is right)",
    "deletion": "Deletion (lower is better)",
    "random_deletion": "Deletion in random order",
    "faithfulness": "Faithfulness (above 0: better than chance)",
    "background_images": "Background images",
}

HOW_TO_READ = (
    "**How to read this.** Red areas speak for the answer, blue areas against it; the stronger the colour, the more "
    "they moved the probability. An overlay shows what the *model* used, not what is medically relevant. "
    "Trust it only as far as its figures go: it should add up, and taking away what it names should matter more than "
    "taking away anything else."
)


def quality_lines(quality: Mapping[str, float]) -> list[str]:
    """A sentence for each figure that the explainer gives (`medloop_explainer` defines them), the others by name."""
    known = dict(quality)
    lines = []
    if "completeness_gap" in known:
        gap = known.pop("completeness_gap")
        lines.append(f"Completeness: adds up to the probability within {percent(gap, 2)} (0 is right).")
    if {"deletion", "random_deletion"} <= known.keys():
        named, at_random = known.pop("deletion"), known.pop("random_deletion")
        known.pop("faithfulness", None)
        lines.append(_faithfulness(named, at_random))
    if "background_images" in known:
        lines.append(f"Measured against {known.pop('background_images'):.0f} training images.")
    return lines + [f"{name.replace('_', ' ').capitalize()}: {value:.4f}" for name, value in known.items()]


def _faithfulness(named: float, at_random: float) -> str:
    figures = (
        f"probability left, on average, while areas are taken away: {percent(named)} in the overlay's order, "
        f"{percent(at_random)} in random order"
    )
    if named < at_random:
        return f"Faithfulness: {figures}. Lower is better: what it names does matter."
    return f"Faithfulness: {figures}. No better than chance: do not rely on this overlay."
