"""CSV files that people write: read as text, checked for their shape, every row with its line number.

A spreadsheet writes what its country is used to: ``;`` or tabs between the cells, a decimal comma, Windows-1252. What
is taken is said once; the plain form (commas, UTF-8) is taken in silence.
"""

from __future__ import annotations

import codecs
import csv
import functools
import io
import itertools
import logging
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from .errors import ManifestError

_log = logging.getLogger(__name__)

_NAME_BYTES = 200
"""File systems take names of 255, and a model's has a suffix."""
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_DECLARATION = re.compile(r'"?sep=[^\r\n]?"?[,;\t]*(?:\r\n|\n|\r)', re.IGNORECASE)
"""A first line that tells Excel the delimiter; the header says the same."""
_LINE_END = re.compile(r"\r\n|\n|\r")
_DECIMAL_COMMA = re.compile(r"([+-]?\d*),(\d+(?:[eE][+-]?\d+)?)")
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(?:\.\d{3})+")
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_rows(
    path: Path, columns: Sequence[str], a_row: str, numbers: Sequence[str] = ()
) -> list[tuple[int, dict[str, str]]]:
    """(line number, row) pairs of a CSV file; blank lines are passed over, cells and header names stripped.

    The delimiter is the comma, semicolon or tab that finds most of the columns in the header. (``csv.Sniffer`` takes
    the comma where rows hold both, as with ``;`` and decimal commas.) The text is UTF-8 or, with a byte order mark,
    UTF-16; what is neither is taken for Windows-1252, of which Latin-1 is a part.

    Args:
        path: the file.
        columns: that the header must name, in any order and case, among others.
        a_row: what stands on a row, for messages ("a row for each video").
        numbers: columns in which 2,5 becomes 2.5, unless the comma is the delimiter.
    Raises:
        ManifestError: the file cannot be read, lacks a column, has a row of another length than its header, or holds
            decimal commas and points that may stand between thousands.
    """
    name = path.name
    text, encoding = _read_text(path)
    # Emptied and not cut off: line numbers stay those of the file.
    text = _DECLARATION.sub("\n", text, count=1) if _DECLARATION.match(text) else text
    delimiter = max(_DELIMITERS, key=lambda one: _found(text, one, columns))
    rest = _cells(text, delimiter, name)
    line, header = next(rest, (0, []))
    header = [cell.lower() for cell in header]
    if not header:
        raise ManifestError(f"{name} must start with a header, and is empty. Write {','.join(columns)} and {a_row}.")
    missing = [column for column in columns if column not in header]
    if missing:
        raise ManifestError(
            f"{name} line {line}: the columns must be {', '.join(columns)}, missing {', '.join(missing)} "
            f"in {delimiter.join(header)!r}. Add them to the header."
        )
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise ManifestError(
            f"{name} line {line}: a column must be there once, got {twice[0]!r} twice. Rename or delete one."
        )
    named = max(place for place, cell in enumerate(header, start=1) if cell)
    commas = [] if delimiter == "," else [column.lower() for column in numbers]
    decimal_commas = False
    doubtful = ""
    rows = []
    for line, cells in rest:
        # Spreadsheets leave out, or add, empty cells at the end of a row.
        if len(cells) < named or any(cells[len(header) :]):
            raise ManifestError(
                f"{name} line {line}: a row must have {len(header)} values as the header has, "
                f"got {len(cells)}. Correct the row."
            )
        row = dict(itertools.zip_longest(header, cells[: len(header)], fillvalue=""))
        for column in commas:
            cell = row.get(column, "")
            if number := _DECIMAL_COMMA.fullmatch(cell):
                row[column] = f"{number[1]}.{number[2]}"
                decimal_commas = True
            elif _THOUSANDS.fullmatch(cell):
                doubtful = doubtful or f"{cell!r} ({name} line {line}, column {column})"
        rows.append((line, row))
    if not rows:
        raise ManifestError(f"{name} must have at least one row, got none. Add {a_row}.")
    if decimal_commas and doubtful:
        raise ManifestError(
            f"beside decimal commas a point must not look like one between thousands, got {doubtful}. "
            "Write a comma if it is a decimal mark, else nothing."
        )
    taken = [] if delimiter == "," else [f"{_DELIMITERS[delimiter]} between the cells"]
    taken += ["a decimal comma"] if decimal_commas else []
    taken += [] if encoding == "UTF-8" else [f"the encoding {encoding}"]
    if taken:
        _say(f"{path}: read with {', '.join(taken)}")
    return rows


def finite(text: str) -> float | None:
    """The number that a cell holds; None if it holds none, or one that is not finite."""
    try:
        value = float(text)
    except ValueError:
        return None
    # Python, and nobody else, takes 1_5 for 15.
    return value if math.isfinite(value) and "_" not in text else None


EXPRESSION_RULE = (
    r"an expression's name must do for a file and for --expression: no '/', '\', ',' or NUL in it, no dot before it, "
    f"no blanks around it, at most {_NAME_BYTES} bytes, and not 'all'"
)


def is_expression_name(name: str) -> bool:
    """Whether a name keeps `EXPRESSION_RULE`: a model's file is called like its expression."""
    return (
        0 < len(name.encode()) <= _NAME_BYTES
        and name == name.strip()
        and not name.startswith(".")
        and not any(mark in name for mark in "/\\,\0")
        and name != "all"
    )


def _read_text(path: Path) -> tuple[str, str]:
    """What a file holds, and the name of its encoding."""
    name = path.name
    try:
        data = path.read_bytes()
    except OSError as err:
        raise ManifestError(f"{name} cannot be read ({err}). Check the file's path and permissions.") from err
    if data.startswith(_UTF_16):
        codec, encoding = "utf-16", "UTF-16"
    elif _is_utf_8(data):
        codec, encoding = "utf-8-sig", "UTF-8"
    else:
        codec, encoding = "cp1252", "Windows-1252"
    before, nul, _ = data.decode(codec, errors="replace").partition("\0")
    if nul:
        raise ManifestError(
            f"{name} {_place(before)}: a table must be text, got a NUL. Save the table as CSV in UTF-8."
        )
    try:
        return data.decode(codec), encoding
    except UnicodeDecodeError as err:
        place = _place(err.object[: err.start].decode(codec))
        raise ManifestError(
            f"{name} {place}: a table must be text of one encoding, and is {encoding} but for the byte "
            f"0x{err.object[err.start]:02X}. Correct that letter, or save the table as UTF-8."
        ) from err


def _is_utf_8(data: bytes) -> bool:
    """Whether a text is UTF-8, damaged or not: in no other encoding do letters beyond ASCII come out whole."""
    try:
        data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return not data.decode("utf-8", errors="ignore").isascii()
    return True


def _place(before: str) -> str:
    """The line and the column that follow a text."""
    lines = _LINE_END.split(before)
    return f"line {len(lines)}, column {len(lines[-1]) + 1}"


def _found(text: str, delimiter: str, columns: Sequence[str]) -> tuple[int, int]:
    """How many of the columns csv finds in the header under a delimiter, and how many cells."""
    try:
        _, header = next(_cells(text, delimiter, ""), (0, []))
    except ManifestError:
        return 0, 0
    return len(set(columns) & {cell.lower() for cell in header}), len(header)


@functools.cache
def _say(text: str) -> None:
    """Once in a process, however often a table is read."""
    _log.warning("%s", text)


def _cells(text: str, delimiter: str, name: str) -> Iterator[tuple[int, list[str]]]:
    """The last line and the stripped cells of each row that is not blank."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if any(cells):
                yield reader.line_num, cells
    except csv.Error as err:
        raise ManifestError(f"{name} is not a CSV file ({err}). Look for a quote that is not closed.") from err
