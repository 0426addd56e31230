"""What can be shown of a file."""

import pytest
from medloop_dashboard.previews import MAX_BYTES, MAX_CHARACTERS, MAX_ROWS, preview
from medloop_dashboard.runs import ArtifactFile


def forbidden() -> bytes:
    raise AssertionError("read although it is not shown")


def test_images_json_tables_and_text() -> None:
    assert preview(ArtifactFile("a/b.PNG", 3), lambda: b"png").data == b"png"
    assert preview(ArtifactFile("a.json", 9), lambda: b'{"a": [1]}').document == {"a": [1]}
    table = preview(ArtifactFile("a.csv", 9), lambda: b"name,n\nNA,1\n").table
    assert table.to_dict("records") == [{"name": "NA", "n": 1}]
    assert preview(ArtifactFile("MLmodel", 9), lambda: "größe".encode()).text == "größe"


@pytest.mark.parametrize(("path", "size"), [("model.onnx", 1), ("values.npz", 1), ("big.json", MAX_BYTES + 1)])
def test_what_is_not_shown_is_not_read(path: str, size: int) -> None:
    shown = preview(ArtifactFile(path, size), forbidden)
    assert shown.kind == "none"
    assert shown.text


@pytest.mark.parametrize(("path", "data"), [("a.json", b"{"), ("a.csv", b""), ("a.txt", b"\xff\xfe\x00")])
def test_a_file_that_is_not_what_it_says_is_told(path: str, data: bytes) -> None:
    shown = preview(ArtifactFile(path, 3), lambda: data)
    assert shown.kind == "none"
    assert "not what its name says" in shown.text


def test_long_files_are_cut_and_say_so() -> None:
    table = preview(ArtifactFile("a.csv", 9), lambda: b"n\n" + b"1\n" * (MAX_ROWS + 1))
    assert len(table.table) == MAX_ROWS
    assert table.note
    text = preview(ArtifactFile("a.log", 9), lambda: b"x" * (MAX_CHARACTERS + 1))
    assert len(text.text) == MAX_CHARACTERS
    assert text.note
