"""CSV files that people write: read as text, checked for their shape, every row with its line number."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from .errors import ManifestError

_NAME_BYTES = 200
"""File systems take names of 255, and a model's has a suffix."""


def read_rows(path: Path, columns: Sequence[str], a_row: str) -> list[tuple[int, dict[str, str]]]:
    """(line number, row) pairs of a CSV file; blank lines are passed over, cells and header names stripped.

    Args:
        path: UTF-8, with or without a byte order mark.
        columns: that the header must name, in any order and case, among others.
        a_row: what stands on a row, for messages ("a row for each video").
    Raises:
        ManifestError: the file cannot be read, lacks a column or has a row of another length than its header.
    """
    name = path.name
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as err:
        raise ManifestError(f"{name} must be UTF-8 text, and is not ({err}). Save it as UTF-8.") from err
    except OSError as err:
        raise ManifestError(f"{name} cannot be read ({err}). Check the file's path and permissions.") from err
    reader = csv.reader(io.StringIO(text, newline=""))
    header = [cell.strip().lower() for cell in next(_cells(reader, name), [])]
    if not any(header):
        raise ManifestError(f"{name} must start with a header, and is empty. Write {','.join(columns)} and {a_row}.")
    missing = [column for column in columns if column not in header]
    if missing:
        raise ManifestError(
            f"{name} line 1: the columns must be {', '.join(columns)}, missing {', '.join(missing)} "
            f"in {','.join(header)!r}. Add them to the header."
        )
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise ManifestError(
            f"{name} line 1: a column must be there once, got {twice[0]!r} twice. Rename or delete one."
        )
    rows = []
    for cells in _cells(reader, name):
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise ManifestError(
                f"{name} line {reader.line_num}: a row must have {len(header)} values as the header has, "
                f"got {len(cells)}. Correct the row."
            )
        rows.append((reader.line_num, {key: cell.strip() for key, cell in zip(header, cells, strict=True)}))
    if not rows:
        raise ManifestError(f"{name} must have at least one row, got none. Add {a_row}.")
    return rows


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


def _cells(reader: Iterator[list[str]], name: str) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as err:
        raise ManifestError(f"{name} is not a CSV file ({err}). Look for a quote that is not closed.") from err
