"""Examples in memory as token ids, and the batches of every step."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaspec.errors import CheckpointError, OptionError
from deltaspec.options.training import DataOptions
from deltaspec.training.data.table import Table
from deltaspec.types.running import Tokenizer

IGNORED = -100  # what transformers' losses leave out
PACKED = 1024  # tokens of a packed sequence where no length is given and the model takes more
CHUNK = 1000  # texts that the tokenizer gets at once
ENDLESS = 10**9  # tokenizers without a limit say 1e30


@dataclass(frozen=True, slots=True)
class Examples:
    """Sequences of token ids one after another.

    ``ids`` is int32 (total,), ``offsets`` int64 (n + 1,) says where each begins. ``labels`` int64 (n,) are class ids,
    empty for causal-lm, and ``names`` the classes in their order. ``cut`` is how many texts were longer than the
    length and lost their end, ``skipped`` how many were empty.
    """

    task: str
    ids: Tensor
    offsets: Tensor
    labels: Tensor
    names: tuple[str, ...] = ()
    cut: int = 0
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """Tokens of each, int64 (n,)."""
        return self.offsets.diff()

    def batch(self, rows: Tensor, *, pad: int) -> dict[str, Tensor]:
        """Lay rows side by side, padded on the right to the longest: input_ids, attention_mask and labels, int64."""
        lengths = self.lengths[rows]
        places = torch.arange(int(lengths.max()))
        mask = places < lengths[:, None]
        ids = self.ids[(self.offsets[rows, None] + places).clamp(max=len(self.ids) - 1)].long()
        labels = ids.masked_fill(~mask, IGNORED) if self.task == "causal-lm" else self.labels[rows]
        return {"input_ids": ids.masked_fill(~mask, pad), "attention_mask": mask.long(), "labels": labels}


@dataclass(frozen=True, slots=True)
class Share:
    """Which process this is, ``rank`` from 0, of how many, ``world``."""

    rank: int = 0
    world: int = 1


ALONE = Share()


class Batches:
    """The batches of a training, any of them at once: the order of an epoch depends on seed and epoch alone.

    Each process takes ``size`` rows of a batch of ``size`` × ``world``. The last batch of an epoch is smaller; its rows
    are as many in each process, so that up to ``world`` - 1 examples miss an epoch.

    Parameters
    ----------
    examples : Examples
    size : int
        Rows at once, in each process.
    seed : int
        Of the order.
    pad : int
        Token id to pad with.
    share : Share
        Which rows this process takes.

    Raises
    ------
    OptionError
        If there are fewer examples than processes.

    Examples
    --------
    >>> ids, offsets = torch.arange(6, dtype=torch.int32), torch.tensor([0, 1, 3, 6])
    >>> batches = Batches(Examples("causal-lm", ids, offsets, torch.empty(0)), size=2, seed=0, pad=0)
    >>> len(batches), sorted(batches.order(epoch=0).tolist())
    (2, [0, 1, 2])
    """

    def __init__(self, examples: Examples, *, size: int, seed: int, pad: int, share: Share = ALONE) -> None:
        self.examples, self.pad, self.seed = examples, pad, seed
        self.size, self.rank, self.world = size, share.rank, share.world
        self._shuffled: tuple[int, Tensor] = (-1, torch.empty(0))
        if not len(self):
            message = f"There are {len(examples)} examples for {share.world} processes: pass more of them."
            raise OptionError(message)

    def __len__(self) -> int:
        """Count the batches of an epoch."""
        usable = len(self.examples) // self.world
        return -(-usable // self.size)

    def order(self, epoch: int) -> Tensor:
        """Return the examples of an epoch in order, int64."""
        if self._shuffled[0] != epoch:
            digest = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()  # CPU generators use 32 bits of a seed
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:4]))
            rows = torch.randperm(len(self.examples), generator=generator)
            self._shuffled = epoch, rows[: len(rows) // self.world * self.world]
        return self._shuffled[1]

    def batch_at(self, number: int) -> dict[str, Tensor]:
        """Return this process's part of a batch, counted from 0 through all epochs."""
        epoch, place = divmod(number, len(self))
        width = self.size * self.world
        rows = self.order(epoch)[place * width : (place + 1) * width]
        return self.examples.batch(rows[self.rank :: self.world], pad=self.pad)


def padding(tokenizer: Tokenizer) -> int:
    """Return the token id to pad with: the tokenizer's own, else its end of text, else 0.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> padding(SimpleNamespace(pad_token_id=None, eos_token_id=2))
    2
    """
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in found if token is not None), 0)


def encode(table: Table, options: DataOptions, tokenizer: Tokenizer, *, limits: tuple[int, int] = (0, 0)) -> Examples:
    """Turn texts into token ids.

    For causal-lm the texts follow one another, each closed by the end-of-text token, and are cut into sequences of the
    length, so that every token is in one. The last, shorter one is kept unless it is of one token, which predicts none.

    Parameters
    ----------
    table : Table
    options : DataOptions
        Of which task, length and cut count.
    tokenizer : transformers tokenizer
    limits : (positions, rows)
        The longest sequence that the model takes, and how many token ids it knows; 0 is any.

    Raises
    ------
    CheckpointError
        If there is no text, or the tokenizer is not the model's.
    OptionError
        If ``length`` exceeds the model's, or a text exceeds ``length`` and is not to be cut.
    """
    length = _choose_length(options, tokenizer, limits[0])
    make = _pack if options.task == "causal-lm" else _separate
    examples = make(table, options, tokenizer, length=length)
    if not len(examples):
        message = f"'{table.source}' has no text in it (--text {options.text}): pass a file with sentences."
        raise CheckpointError(message)
    largest = int(examples.ids.max())
    if limits[1] and largest >= limits[1]:
        message = (
            f"The tokenizer gives id {largest} on '{table.source}', and the model's vocabulary has {limits[1]} tokens: "
            "check that the tokenizer's files belong to this model."
        )
        raise CheckpointError(message)
    return examples


def _choose_length(options: DataOptions, tokenizer: Tokenizer, positions: int) -> int:
    """Return the tokens of a sequence at most: what is asked for, or what the model takes; 0 is any."""
    limit = int(min(tokenizer.model_max_length, positions or ENDLESS))
    if options.length > limit:
        message = f"--length is {options.length}, and the model takes {limit} tokens at most: pass {limit} or less."
        raise OptionError(message)
    default = min(limit, PACKED) if options.task == "causal-lm" else limit % ENDLESS
    return options.length or default


def _tokenize(texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Yield token ids of texts, special tokens included, however long."""
    for start in range(0, len(texts), CHUNK):
        yield from tokenizer(list(texts[start : start + CHUNK]), verbose=False)["input_ids"]


def _separate(table: Table, options: DataOptions, tokenizer: Tokenizer, *, length: int) -> Examples:
    """One sequence a text, its end cut off where it is too long."""
    flat, sizes, kept, cut = array("i"), list[int](), list[int](), 0
    for row, ids in enumerate(_tokenize(table.texts, tokenizer)):
        if length and len(ids) > length:
            if not options.cut:
                message = (
                    f"Row {table.rows[row]} of '{table.source}' has {len(ids)} tokens, and an example takes {length}: "
                    "pass --cut to leave out the ends of such texts, or a larger --length if the model takes more."
                )
                raise OptionError(message)
            ids = tokenizer([table.texts[row]], truncation=True, max_length=length)["input_ids"][0]
            cut += 1
        if ids:
            flat.extend(ids)
            sizes.append(len(ids))
            kept.append(row)
    labels = torch.tensor([table.labels[row] for row in kept], dtype=torch.int64)
    skipped = table.skipped + len(table.texts) - len(kept)
    return Examples(options.task, _tensor(flat), _offsets(sizes), labels, table.names, cut, skipped)


def _pack(table: Table, options: DataOptions, tokenizer: Tokenizer, *, length: int) -> Examples:
    """Sequences of one length across texts."""
    flat, end = array("i"), tokenizer.eos_token_id
    for ids in _tokenize(table.texts, tokenizer):
        flat.extend(ids)
        if end is not None and ids[-1:] != [end]:
            flat.append(end)
    whole, rest = divmod(len(flat), length)
    sizes = [length] * whole + [rest] * (rest > 1)
    tokens = _tensor(flat)[: sum(sizes)]
    return Examples(options.task, tokens, _offsets(sizes), torch.empty(0, dtype=torch.int64), skipped=table.skipped)


def _tensor(flat: array[int]) -> Tensor:
    return torch.frombuffer(flat, dtype=torch.int32) if flat else torch.empty(0, dtype=torch.int32)


def _offsets(sizes: Sequence[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int64)
