"""qafe/tables.py: rows as text with their line numbers, and one line about a file that is no table."""

from pathlib import Path

import pytest

from qafe.errors import ManifestError
from qafe.tables import is_expression_name, read_rows


def read(tmp_path: Path, data: str | bytes) -> list[tuple[int, dict[str, str]]]:
    path = tmp_path / "own.csv"
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return read_rows(path, ("id", "label"), "a row for each video")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_rows_and_their_lines(tmp_path: Path, end: str, mark: str) -> None:
    text = end.join([mark + "Label, ID ,x", "1, a ,", " , ,", "", "2,ü,y"])
    assert read(tmp_path, text) == [
        (2, {"label": "1", "id": "a", "x": ""}),
        (5, {"label": "2", "id": "ü", "x": "y"}),
    ]


def test_a_cell_of_two_lines(tmp_path: Path) -> None:
    assert read(tmp_path, 'id,label\n"a\nb",1\nc,2\n') == [
        (3, {"id": "a\nb", "label": "1"}),
        (4, {"id": "c", "label": "2"}),
    ]


def test_unnamed_columns_may_repeat(tmp_path: Path) -> None:
    assert read(tmp_path, "id,label,,\na,1,,\n") == [(2, {"id": "a", "label": "1", "": ""})]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", r"own\.csv must start with a header, and is empty\. Write id,label and a row for each video\."),
        ("\n\nid,label\n", "must start with a header"),
        ("id,score\na,1\n", r"line 1: the columns must be id, label, missing label in 'id,score'"),
        ("id,label,ID\na,1,b\n", r"line 1: a column must be there once, got 'id' twice"),
        ("id,label\n", "must have at least one row, got none"),
        ("id,label\na,1\nb\n", r"line 3: a row must have 2 values as the header has, got 1"),
        (b"id,label\n\xff\xfe,1\n", "must be UTF-8 text"),
        ('id,label\n"' + "x" * 140_000, "is not a CSV file"),
    ],
)
def test_no_table(tmp_path: Path, data: str | bytes, message: str) -> None:
    with pytest.raises(ManifestError, match=message) as caught:
        read(tmp_path, data)
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(ManifestError, match="cannot be read"):
            read_rows(path, ("id",), "a row")


@pytest.mark.parametrize("name", ["smile", "wide eyes", "Lächeln", "笑", "7", "a.b", "all of it", "x" * 200])
def test_names_of_expressions(name: str) -> None:
    assert is_expression_name(name)


@pytest.mark.parametrize(
    "name", ["", "all", "a/b", "a\\b", "a\0b", "a,b", ".a", "..", " a", "a ", "a\n", "\u00a0a", "x" * 201, "笑" * 67]
)
def test_what_cannot_name_an_expression(name: str) -> None:
    assert not is_expression_name(name)
