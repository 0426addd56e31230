"""Where images come from: one module a kind, all of which give a `Source`."""

from pathlib import Path

from medloop.data.sources.labelled import labelled_folder_source, table_source
from medloop.data.sources.npz import npz_source
from medloop.data.sources.phantoms import phantom_source
from medloop.data.sources.source import RawImage, Source
from medloop.data.sources.tree import folder_source, prefix_source, zip_source
from medloop.errors import InvalidDataset, InvalidRequest

__all__ = ["PHANTOMS", "RawImage", "Source", "open_source", "phantom_source"]

PHANTOMS = "phantoms"
"""The location of the built-in synthetic set."""


def open_source(location: str, *, labels: str | Path | None = None) -> Source:
    """The images at `location`, told apart by its form:

    - a folder or .zip of class folders, with or without train/val/test folders above them;
    - a folder with a label table (`labels`, or labels.csv in it), for DICOM above all;
    - a MedMNIST .npz; a .csv or .parquet manifest; an `s3://bucket/prefix` of class folders; `phantoms`.

    Raises `InvalidDataset`, whose issues say what is wrong and where, when nothing can be made of it, and
    `StorageUnavailable` when S3 does not answer. What is wrong with single images comes while reading.
    """
    if location.startswith("s3://"):
        return prefix_source(location)
    if location == PHANTOMS:
        return phantom_source()
    path = Path(location).expanduser()
    if not path.exists():
        raise InvalidDataset(
            f"There is nothing at {location}; name a folder, .zip, .npz, .csv, .parquet or s3:// prefix."
        )
    if path.is_dir():
        return _open_folder(path, Path(labels) if labels else None)
    if labels:
        raise InvalidRequest("A label table goes with a folder; a file brings its labels along.")
    openers = {".zip": zip_source, ".npz": npz_source, ".csv": table_source, ".parquet": table_source}
    if (opener := openers.get(path.suffix.lower())) is None:
        raise InvalidDataset(f"{path.name} is none of .zip, .npz, .csv and .parquet; convert it, or name its folder.")
    return opener(path)


def _open_folder(folder: Path, labels: Path | None) -> Source:
    if labels is None and (folder / "labels.csv").is_file():
        labels = folder / "labels.csv"
    return labelled_folder_source(folder, labels) if labels else folder_source(folder)
