"""A text file → batches of token ids without padding."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaspec.errors import CheckpointError
from deltaspec.options import TextOptions

SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv")


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of one length, so that none needs padding: ids (n, length), and the text line each begins at."""

    ids: Tensor
    lines: tuple[int, ...]


def digest(path: Path) -> str:
    """Return the sha256 of a text file.

    Raises
    ------
    CheckpointError
        If it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as cause:
        message = f"Cannot read the text '{path}' ({cause.strerror or cause}): check the path."
        raise CheckpointError(message) from cause


def read_texts(path: Path, *, field: str) -> Iterator[tuple[int, str]]:
    """Yield the texts of a file that are not blank, each with the number of its line.

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
        with path.open(encoding="utf-8-sig", newline="" if kind in (".csv", ".tsv") else None) as stream:
            if kind == ".txt":
                rows: Iterator[tuple[int, str]] = enumerate(stream, 1)
            elif kind == ".jsonl":
                rows = _read_objects(stream, path=path, field=field)
            else:
                rows = _read_columns(stream, path=path, field=field)
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


def _read_columns(stream: Iterator[str], *, path: Path, field: str) -> Iterator[tuple[int, str]]:
    tabs = path.suffix.lower() == ".tsv"
    rows = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(stream)
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


def make_batches(
    path: Path,
    tokenizer: Any,
    options: TextOptions,
    *,
    packed: bool,
    limits: tuple[int, int] = (0, 0),
    distinct: bool = False,
) -> list[Batch]:
    """Tokenise the beginning of a text file.

    Parameters
    ----------
    path : Path
    tokenizer : transformers tokenizer
    options : TextOptions
    packed : bool
        For causal models: the texts one after another, each closed by the end-of-text token, cut into sequences of
        ``options.length`` tokens. Otherwise each text is a sequence of its own, its end cut off if it is longer.
    limits : (positions, rows)
        The longest sequence that the model takes, and how many token ids it knows; 0 is any.
    distinct : bool
        Take equal sequences once.

    Returns
    -------
    list of Batch
        Shortest sequences first; together at most ``options.tokens`` tokens.

    Raises
    ------
    CheckpointError
        If the file cannot be read or holds no text, or the tokenizer does not belong to the model.
    """
    length = min(options.length, limits[0] or options.length, int(tokenizer.model_max_length))
    texts = read_texts(path, field=options.field)
    room = min(length, options.tokens)
    rows = _pack(texts, tokenizer, options, length=room) if packed else _cut(texts, tokenizer, options, length=room)
    groups: defaultdict[int, list[tuple[list[int], int]]] = defaultdict(list)
    known: set[tuple[int, ...]] = set()
    for ids, line in rows:
        if distinct:
            if tuple(ids) in known:
                continue
            known.add(tuple(ids))
        groups[len(ids)].append((ids, line))
    if not groups:
        message = f"The text '{path}' has no text in it (--field {options.field}): pass a file with sentences."
        raise CheckpointError(message)
    _check_ids(groups, limits[1])
    batches = []
    for size in sorted(groups):
        count = max(1, options.batch * length // size)
        for start in range(0, len(groups[size]), count):
            chosen = groups[size][start : start + count]
            batches.append(Batch(torch.tensor([ids for ids, _ in chosen]), tuple(line for _, line in chosen)))
    return batches


def _check_ids(groups: dict[int, list[tuple[list[int], int]]], rows: int) -> None:
    """Refuse token ids that the model has no embedding for."""
    largest, line = max((max(ids), line) for group in groups.values() for ids, line in group)
    if rows and largest >= rows:
        message = (
            f"The tokenizer gives id {largest} on text line {line}, and the model's vocabulary has {rows} tokens: "
            "check that the tokenizer's files belong to this model."
        )
        raise CheckpointError(message)


def _cut(
    texts: Iterator[tuple[int, str]], tokenizer: Any, options: TextOptions, *, length: int
) -> Iterator[tuple[list[int], int]]:
    """One sequence a text, until the next one would exceed the limit."""
    total = 0
    for line, text in texts:
        ids = tokenizer(text, truncation=True, max_length=length)["input_ids"]
        total += len(ids)
        if total > options.tokens:
            return
        if ids:
            yield ids, line


def _pack(
    texts: Iterator[tuple[int, str]], tokenizer: Any, options: TextOptions, *, length: int
) -> Iterator[tuple[list[int], int]]:
    """Sequences of ``length`` tokens across texts, until the limit; the last ones may be shorter."""
    waiting: list[tuple[int, int]] = []
    left, end = options.tokens, tokenizer.eos_token_id
    for line, text in texts:
        ids = tokenizer(text)["input_ids"]
        closing = [end] if end is not None and ids[-1:] != [end] else []
        waiting += [(token, line) for token in (*ids, *closing)]
        while len(waiting) >= length and left > 0:
            piece, waiting = waiting[: min(length, left)], waiting[length:]
            left -= len(piece)
            yield [token for token, _ in piece], piece[0][1]
        if left <= 0:
            return
    if piece := waiting[:left]:
        yield [token for token, _ in piece], piece[0][1]
