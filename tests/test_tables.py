"""qafe/tables.py: rows as text with their line numbers, and one line about a file that is no table."""

import codecs
import logging
from pathlib import Path

import pytest

from qafe.errors import ManifestError
from qafe.tables import finite, is_expression_name, read_rows


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
        ("\n,;\n", "line 2: .* missing id, label in ',;'"),
        ("\n\n", "must start with a header"),
        ("sep=;\n", "must start with a header"),
        ("\n\nid,label\n", "must have at least one row, got none"),
        ("id,score\na,1\n", r"line 1: the columns must be id, label, missing label in 'id,score'"),
        ("id,label,ID\na,1,b\n", r"line 1: a column must be there once, got 'id' twice"),
        ("id,label\n", "must have at least one row, got none"),
        ("id,label\na,1\nb\n", r"line 3: a row must have 2 values as the header has, got 1"),
        ("id,label\na,1,2\n", r"line 2: a row must have 2 values as the header has, got 3"),
        ("id;label;;\na;1;;;5\n", r"line 2: a row must have 4 values as the header has, got 5"),
        ("id;score\na;1\n", r"line 1: the columns must be id, label, missing label in 'id;score'"),
        ("Patient|id|label\n", r"missing id, label in 'patient\|id\|label'"),
        ("\n\nid;label;ID\na;1;b\n", r"line 3: a column must be there once, got 'id' twice"),
        ("sep=;\nid;label\n\na;1;2\n", r"line 4: a row must have 2 values"),
        (
            b"id,label\r\nM\xfcller,1\r\nx,2\x81\r\n",
            r"own\.csv line 3, column 4: .* is Windows-1252 but for the byte 0x81\. Correct that letter",
        ),
        (
            "id,label\nMüller,1\n".encode() + b"Na\xefve,2\n",
            r"own\.csv line 3, column 3: .* is UTF-8 but for the byte 0xEF\.",
        ),
        (codecs.BOM_UTF8 + b"id,label\na\xff,1\n", r"own\.csv line 2, column 2: .* is UTF-8 but for the byte 0xFF\."),
        ("id,label\nü,1".encode("utf-16") + b"\n", r"own\.csv line 2, column 4: .* is UTF-16 but for the byte 0x0A"),
        # A workbook that is called .csv: NULs, and bytes that are no letters.
        (
            b"PK\x03\x04\x14\x00\x00\x81",
            r"own\.csv line 1, column 6: a table must be text, got a NUL\. Save .* as CSV in",
        ),
        ("id,label\na,1\n".encode("utf-16-le"), r"own\.csv line 1, column 2: a table must be text, got a NUL"),
        ('id,label\n"' + "x" * 140_000, "is not a CSV file"),
    ],
)
def test_no_table(tmp_path: Path, data: str | bytes, message: str) -> None:
    with pytest.raises(ManifestError, match=message) as caught:
        read(tmp_path, data)
    assert "\n" not in str(caught.value)


TABLE = "Video Ä;id;label;start\n;a;2,5;\nä, ö;b;-0,25;1,5e1\n\n;c;3;1.25\n"
ROWS = [
    (2, {"video ä": "", "id": "a", "label": "2.5", "start": ""}),
    (3, {"video ä": "ä, ö", "id": "b", "label": "-0.25", "start": "1.5e1"}),
    (5, {"video ä": "", "id": "c", "label": "3", "start": "1.25"}),
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252"])
@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_what_spreadsheets_write(
    tmp_path: Path, delimiter: str, encoding: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "own.csv"
    path.write_bytes(TABLE.replace(";", delimiter).replace("\n", "\r\n").encode(encoding))
    for _ in range(2):
        assert read_rows(path, ("id", "label"), "a row", ("label", "Start")) == ROWS
    said = f"{path}: read with {'tabs' if delimiter == chr(9) else 'semicolons'} between the cells, a decimal comma"
    said += {"utf-16": ", the encoding UTF-16", "latin-1": ", the encoding Windows-1252"}.get(
        encoding.replace("cp1252", "latin-1"), ""
    )
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [(logging.WARNING, said)]


def test_the_plain_form_is_read_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "own.csv"
    path.write_text('\ufeffid,label\n"2,5","2,5"\n', encoding="utf-8")
    assert read_rows(path, ("id", "label"), "a row", ("label",)) == [(2, {"id": "2,5", "label": "2,5"})]
    assert not caplog.records


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("sep=;\nid;label\na;2,5\n", [(3, "a", "2.5")]),
        ('"SEP=;"\r\nid;label\r\na;2,5\r\n', [(3, "a", "2.5")]),
        ("sep=,\nid,label\na,2.5\n", [(3, "a", "2.5")]),
        ("sep=\t\nid\tlabel\na\t2,5\n", [(3, "a", "2.5")]),
        ("id;label;;;\na;1;;;\nb;2\nc;3;;;;;\n;;;;\n", [(2, "a", "1"), (3, "b", "2"), (4, "c", "3")]),
        (";;\n\nid;label;\na;1;\n", [(4, "a", "1")]),
        ('"id, of the clip";id;label\n"x;y, z";a;1,5\n', [(2, "a", "1.5")]),
        ('x,"a;b;c;d",id,label\n;;;;,;,a,1\n', [(2, "a", "1")]),
        ("id;label\n1,2;1,2\n1,2;x, y\n", [(2, "1,2", "1.2"), (3, "1,2", "x, y")]),
        ("id;label\na;1.234,5\nb;1,2,3\nc;,5\n", [(2, "a", "1.234,5"), (3, "b", "1,2,3"), (4, "c", ".5")]),
    ],
)
def test_how_tables_look(tmp_path: Path, text: str, rows: list[tuple[int, str, str]]) -> None:
    path = tmp_path / "own.csv"
    path.write_bytes(text.encode())
    found = read_rows(path, ("id", "label"), "a row", ("label",))
    assert [(line, row["id"], row["label"]) for line, row in found] == rows


@pytest.mark.parametrize("delimiter", [";", "\t"])
@pytest.mark.parametrize("cell", ["1.234", "-12.345.678"])
@pytest.mark.parametrize("first", [True, False])
def test_a_point_that_may_stand_between_thousands(tmp_path: Path, delimiter: str, cell: str, first: bool) -> None:
    path, rows = tmp_path / "own.csv", [f"a{delimiter}{cell}", f"b{delimiter}2,5"]
    path.write_text("\n".join([f"id{delimiter}label", *(rows if first else rows[::-1])]))
    line = 2 if first else 3
    with pytest.raises(ManifestError, match=rf"got '{cell}' \(own\.csv line {line}, column label\)\. Write a comma"):
        read_rows(path, ("id", "label"), "a row", ("label",))


@pytest.mark.parametrize(
    "rows", ["a;1.234\nb;2.5", "a;0.125\nb;2,5", "a;1.25\nb;2,5", "1.234;1\nb;2,5", "a;1,234\nb;2,5"]
)
def test_points_that_are_decimal(tmp_path: Path, rows: str) -> None:
    path = tmp_path / "own.csv"
    path.write_text(f"id;label\n{rows}\n")
    found = read_rows(path, ("id", "label"), "a row", ("label",))
    assert [row["label"] for _, row in found] == [line.split(";")[1].replace(",", ".") for line in rows.split("\n")]


def test_numbers() -> None:
    assert [finite(text) for text in ("2", "-.5", "1e1", " 3 ")] == [2, -0.5, 10, 3]
    assert [finite(text) for text in ("", "2,5", "1_5", "nan", "inf", "1e999", "severe")] == [None] * 7


@pytest.mark.parametrize("text", ["id\na, b; c\n", 'id;\n"a, b; c";\n'])
def test_one_column(tmp_path: Path, text: str) -> None:
    path = tmp_path / "own.csv"
    path.write_text(text.replace("a, b; c", '"a, b; c"') if text.startswith("id\n") else text)
    assert [(line, row["id"]) for line, row in read_rows(path, ("id",), "a row")] == [(2, "a, b; c")]


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
