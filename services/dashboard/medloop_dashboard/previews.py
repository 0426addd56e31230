"""What can be shown of a run's file without downloading more than a page can hold."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd

from medloop_dashboard.runs import ArtifactFile
from medloop_dashboard.wording import file_size

MAX_BYTES = 4 * 2**20
MAX_ROWS = 500
MAX_CHARACTERS = 20_000

_IMAGES = frozenset({".png", ".jpg", ".jpeg", ".gif", ".webp"})
_TEXTS = frozenset({"", ".txt", ".md", ".yaml", ".yml", ".toml", ".log"})

Kind = Literal["image", "json", "table", "text", "none"]


@dataclass(frozen=True, slots=True)
class Preview:
    """What a page draws: the member that `kind` names, and a `note` on what was left out."""

    file: ArtifactFile
    kind: Kind
    data: bytes = b""
    document: Any = None
    table: pd.DataFrame = field(default_factory=pd.DataFrame)
    text: str = ""
    note: str = ""


def preview(file: ArtifactFile, read: Callable[[], bytes]) -> Preview:
    """The preview of `file`; `read` is called only for a kind and size that is shown."""
    kinds: dict[str, Kind] = {".json": "json", ".csv": "table"}
    kind = "image" if file.suffix in _IMAGES else "text" if file.suffix in _TEXTS else kinds.get(file.suffix, "none")
    if kind == "none":
        return Preview(file, "none", text="This kind of file has no preview; download it from MLflow.")
    if file.size > MAX_BYTES:
        return Preview(file, "none", text=f"{file_size(file.size)} are too much to show; download it from MLflow.")
    data = read()
    if kind == "image":
        return Preview(file, "image", data=data)
    try:
        return _parsed(file, kind, data)
    except ValueError:  # UnicodeDecodeError, JSONDecodeError and pandas' parser errors are such
        return Preview(file, "none", text=f"This file is not what its name says ({file.suffix or 'text'}).")


def _parsed(file: ArtifactFile, kind: Kind, data: bytes) -> Preview:
    if kind == "json":
        return Preview(file, "json", document=json.loads(data))
    if kind == "table":
        table = pd.read_csv(io.BytesIO(data), nrows=MAX_ROWS, keep_default_na=False)
        note = f"The first {MAX_ROWS} lines." if len(table) == MAX_ROWS else ""
        return Preview(file, "table", table=table, note=note)
    text = data.decode()
    note = f"The first {MAX_CHARACTERS:,} characters." if len(text) > MAX_CHARACTERS else ""
    return Preview(file, "text", text=text[:MAX_CHARACTERS], note=note)
