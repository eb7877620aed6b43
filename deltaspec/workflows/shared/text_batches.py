"""A text file → batches of token ids without padding."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from deltaspec.errors import CheckpointError
from deltaspec.io.text_rows import read_texts
from deltaspec.options import TextOptions

Tokens = tuple[list[int], int]  # token ids, and the text line that they begin at


class SingleTokenizer(Protocol):
    """What is asked of a tokenizer of transformers that gets one text at a time."""

    model_max_length: int
    eos_token_id: int | None

    def __call__(self, text: str, *, truncation: bool = ..., max_length: int = ...) -> Mapping[str, list[int]]:
        """Return ``input_ids``, special tokens included."""


@dataclass(frozen=True, slots=True)
class Text:
    """A text file, and how much of it is read: see ``deltaspec.io.text_rows.read_texts`` for what it may be."""

    path: Path
    options: TextOptions


@dataclass(frozen=True, slots=True)
class Intake:
    """How a model takes texts in.

    Attributes
    ----------
    packed : bool
        Causal models: the texts one after another, each closed by the end-of-text token, cut into sequences of
        ``TextOptions.length`` tokens. Otherwise each text is a sequence of its own, its end cut off if it is longer.
    longest, vocabulary : int
        The longest sequence that the model takes, and how many token ids it knows; 0 is any.
    distinct : bool
        Take equal sequences once.
    """

    packed: bool
    longest: int = 0
    vocabulary: int = 0
    distinct: bool = False


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


def make_batches(text: Text, tokenizer: SingleTokenizer, intake: Intake) -> list[Batch]:
    """Tokenise the beginning of a text file.

    Returns
    -------
    list of Batch
        Shortest sequences first; together at most ``text.options.tokens`` tokens.

    Raises
    ------
    CheckpointError
        If the file cannot be read or holds no text, or the tokenizer does not belong to the model.
    """
    options = text.options
    groups: defaultdict[int, list[Tokens]] = defaultdict(list)
    known: set[tuple[int, ...]] = set()
    length = min(options.length, intake.longest or options.length, int(tokenizer.model_max_length))
    texts = read_texts(text.path, field=options.field)
    cut = _pack if intake.packed else _cut
    for ids, line in cut(texts, tokenizer, options, length=min(length, options.tokens)):
        if intake.distinct:
            if tuple(ids) in known:
                continue
            known.add(tuple(ids))
        groups[len(ids)].append((ids, line))
    if not groups:
        message = f"The text '{text.path}' has no text in it (--field {options.field}): pass a file with sentences."
        raise CheckpointError(message)
    _check_ids(groups, intake.vocabulary)
    batches = []
    for size in sorted(groups):
        count = max(1, options.batch * length // size)
        for start in range(0, len(groups[size]), count):
            chosen = groups[size][start : start + count]
            batches.append(Batch(torch.tensor([ids for ids, _ in chosen]), tuple(line for _, line in chosen)))
    return batches


def _check_ids(groups: dict[int, list[Tokens]], vocabulary: int) -> None:
    """Refuse token ids that the model has no embedding for."""
    largest, line = max((max(ids), line) for group in groups.values() for ids, line in group)
    if vocabulary and largest >= vocabulary:
        message = (
            f"The tokenizer gives id {largest} on text line {line}, and the model's vocabulary has {vocabulary} "
            "tokens: check that the tokenizer's files belong to this model."
        )
        raise CheckpointError(message)


def _cut(
    texts: Iterator[tuple[int, str]], tokenizer: SingleTokenizer, options: TextOptions, *, length: int
) -> Iterator[Tokens]:
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
    texts: Iterator[tuple[int, str]], tokenizer: SingleTokenizer, options: TextOptions, *, length: int
) -> Iterator[Tokens]:
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
