"""Rows of a text file, as they stand in it: plain lines, JSON lines, and values that commas or tabs separate."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from deltaspec.errors import CheckpointError

if TYPE_CHECKING:
    from _csv import Reader

ENCODING = "utf-8-sig"  # UTF-8, with or without a byte order mark
SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv")


def is_tabbed(path: Path) -> bool:
    """Tell whether tabs separate a file's values; then quotes are text like any other."""
    return path.suffix.lower() == ".tsv"


def separate(stream: Iterator[str], path: Path) -> Reader:
    r"""Split lines into values as the file's name says: at tabs, quotes taken as they are; else at commas.

    Parameters
    ----------
    stream : iterator of str
        The lines of ``path``, opened with ``newline=""``.
    path : Path

    Examples
    --------
    >>> list(separate(iter(['1,"a, b"']), Path("some.csv"))), list(separate(iter(['1\t"a, b"']), Path("some.tsv")))
    ([['1', 'a, b']], [['1', '"a, b"']])
    """
    if is_tabbed(path):
        return csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
    return csv.reader(stream)


def read_texts(path: Path, *, field: str) -> Iterator[tuple[int, str]]:
    """Yield the texts of a file that are not blank, each with the number of its line; no more is read than is taken.

    Parameters
    ----------
    path : Path
        UTF-8: ``.txt`` holds one text a line; ``.jsonl`` one JSON object a line; ``.csv`` and ``.tsv`` one text a row
        (tab-separated values are taken as they are, quotes included).
    field : str
        The key, or the column by name, or by number from 1 where the file has no line of names.

    Raises
    ------
    CheckpointError
        If it cannot be read, is of another kind, or lacks the field.
    """
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        message = f"Cannot read the text '{path}': expected a file that ends in {', '.join(SUFFIXES)}."
        raise CheckpointError(message)
    try:
        with path.open(encoding=ENCODING, newline="" if kind in (".csv", ".tsv") else None) as stream:
            if kind == ".txt":
                rows: Iterator[tuple[int, str]] = enumerate(stream, 1)
            elif kind == ".jsonl":
                rows = _read_objects(stream, path=path, field=field)
            else:
                rows = _read_column(stream, path=path, field=field)
            yield from ((line, text.strip()) for line, text in rows if text.strip())
    except (OSError, UnicodeDecodeError, csv.Error) as cause:
        message = f"Cannot read the text '{path}' ({cause}): check the path, and that it is UTF-8."
        raise CheckpointError(message) from cause


def _read_objects(stream: Iterator[str], *, path: Path, field: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as cause:
            message = f"Cannot read line {number} of '{path}' as JSON ({cause}): repair it."
            raise CheckpointError(message) from cause
        if not isinstance(found, dict) or not isinstance(found.get(field), str):
            held = f"the keys {', '.join(map(str, found))}" if isinstance(found, dict) else type(found).__name__
            message = f"Line {number} of '{path}' has no text under '{field}': it has {held}; pass --field."
            raise CheckpointError(message)
        yield number, found[field]


def _read_column(stream: Iterator[str], *, path: Path, field: str) -> Iterator[tuple[int, str]]:
    rows = separate(stream, path)
    if field.isdecimal() and int(field) > 0:
        column = int(field) - 1
    else:
        names = next(rows, [])
        if field not in names:
            message = (
                f"'{path}' has no column '{field}': its first line is {', '.join(names)[:200]!r}; pass --field with a "
                "name from it, or with a number from 1 if the file has no line of names."
            )
            raise CheckpointError(message)
        column = names.index(field)
    for row in rows:
        if row and len(row) <= column:
            message = f"Line {rows.line_num} of '{path}' has {len(row)} columns, and no number {column + 1}: repair it."
            raise CheckpointError(message)
        if row:
            yield rows.line_num, row[column]
