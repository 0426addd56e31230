"""The methods by name."""

from typing import Literal, get_args

from medloop.errors import InvalidRequest

Method = Literal["integrated-gradients", "shap"]
METHODS: tuple[Method, ...] = get_args(Method)
SUFFIX: dict[Method, str] = {"integrated-gradients": "ig", "shap": "shap"}
"""Of the overlays' file names."""


def parse_methods(text: str) -> tuple[Method, ...]:
    """Comma-separated names, each once; raises InvalidRequest for anything else."""
    asked = {name.strip() for name in text.split(",")}
    if unknown := asked - set(METHODS):
        raise InvalidRequest(f"There is no method {', '.join(sorted(unknown))!r}; choose from {', '.join(METHODS)}.")
    return tuple(method for method in METHODS if method in asked)
