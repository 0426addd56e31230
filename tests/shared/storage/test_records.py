"""Which store an address opens."""

from pathlib import Path

import pytest
from medloop.errors import InvalidRequest
from medloop.storage.records import open_records
from medloop.storage.sqlite import SqliteRecords


def test_sqlite_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url in (f"sqlite:///{tmp_path}/a b.sqlite", "sqlite:///a b.sqlite"):
        records = open_records(url)
        assert isinstance(records, SqliteRecords)
        assert records.url == f"sqlite:///{tmp_path}/a b.sqlite"
        assert not (tmp_path / "a b.sqlite").exists()  # opening makes nothing


@pytest.mark.parametrize(
    "url", ["", "records.sqlite", "sqlite://", "sqlite:///", "sqlite:records", "postgresql://somebody:hunter2@host/x"]
)
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="sqlite:///") as caught:
        open_records(url)
    assert "hunter2" not in str(caught.value)
