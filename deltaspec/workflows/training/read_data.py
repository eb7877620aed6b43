"""Files and data sets of the hub → the examples that a training learns from and is measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from deltaspec.errors import OptionError
from deltaspec.io.data_rows import read_rows
from deltaspec.options.recipe import DataSources, Recipe
from deltaspec.options.training import DataOptions
from deltaspec.training.data.examples import Examples, encode
from deltaspec.training.data.table import Table, list_fields, make_table, split_table
from deltaspec.types.running import Tokenizer

TESTED = 0.2  # of other data, where nothing is held out of the training's


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What is learned from, what is held out, and what a probe learns from and is tested on, or one other text."""

    train: Examples
    held: Examples | None
    forget: tuple[Examples, ...]

    def describe(self, recipe: Recipe) -> dict[str, Any]:
        """Say how and where data were read, and hash what was: token ids and classes, in their order."""
        digest, sources = hashlib.sha256(), find_sources(recipe)
        for part in (self.train, self.held, *self.forget):
            for tensor in (part.ids, part.offsets, part.labels) if part else ():
                digest.update(tensor.numpy().tobytes())
            digest.update(b"\0")
        return {
            **asdict(recipe.data),
            "names": list(self.train.names),
            "sources": sources.to_dict(),
            "forget_options": None if sources.forget is None else asdict(recipe.forget_data or recipe.data),
            "sha256": digest.hexdigest(),
        }


def find_sources(recipe: Recipe) -> DataSources:
    """Return where a recipe's data are; OptionError where it names none as DataSources."""
    if not isinstance(recipe.sources, DataSources):  # None, or a file's name without its class
        message = "There is nothing to train on: pass a Recipe with sources, such as DataSources('train.csv')."
        raise OptionError(message)
    return recipe.sources


def read_data(recipe: Recipe, tokenizer: Tokenizer, *, limits: tuple[int, int]) -> TrainingData:
    """Read all that a training needs.

    Parameters
    ----------
    recipe : Recipe
    tokenizer : transformers tokenizer
    limits : (positions, rows)
        The longest sequence that the model takes, and how many token ids it knows; 0 is any.

    Raises
    ------
    CheckpointError
        If data cannot be read, or have nothing to learn from.
    OptionError
        If the recipe names no data, or its options do not fit them.
    """
    sources, options = find_sources(recipe), recipe.data
    train: Examples
    held: Examples | None = None
    if sources.held is not None:
        train = read_examples(str(sources.train), options, tokenizer, limits=limits)
        held = read_examples(str(sources.held), options, tokenizer, limits=limits, names=train.names)
    elif options.holdout:
        train, held = read_split(str(sources.train), options, tokenizer, limits=limits)
    else:
        train = read_examples(str(sources.train), options, tokenizer, limits=limits)
    return TrainingData(train, held, _read_forget(recipe, tokenizer, limits))


def _read_forget(recipe: Recipe, tokenizer: Tokenizer, limits: tuple[int, int]) -> tuple[Examples, ...]:
    source = find_sources(recipe).forget
    if source is None:
        return ()
    options = recipe.forget_data or recipe.data
    if options.task != recipe.data.task:
        message = f"Forgetting is measured by the task of the training ({recipe.data.task}), found {options.task}."
        raise OptionError(message)
    if options.task == "causal-lm":
        return (read_examples(str(source), options, tokenizer, limits=limits),)
    options = replace(options, holdout=options.holdout or TESTED)
    return read_split(str(source), options, tokenizer, limits=limits)


def read_examples(
    ref: str, options: DataOptions, tokenizer: Tokenizer, *, limits: tuple[int, int] = (0, 0), names: Sequence[str] = ()
) -> Examples:
    """Read all examples of a file or hub data set.

    Parameters
    ----------
    ref : str
        A path, or ``owner/name`` or ``owner/name:split`` of the hub.
    options : DataOptions
    tokenizer : transformers tokenizer
    limits : (positions, rows)
        The longest sequence that the model takes, and how many token ids it knows; 0 is any.
    names : sequence of str
        The classes of other data, in their order; this data must have no others.

    Raises
    ------
    CheckpointError
        If it cannot be read, lacks a field or class, has no text, or the tokenizer is not the model's.
    OptionError
        If ``length`` exceeds the model's, or a text exceeds ``length`` and is not to be cut.
    """
    return encode(read_table(ref, options, names=names), options, tokenizer, limits=limits)


def read_split(
    ref: str, options: DataOptions, tokenizer: Tokenizer, *, limits: tuple[int, int] = (0, 0)
) -> tuple[Examples, Examples]:
    """Read examples for training and a held-out share of them, ``options.holdout``; arguments as of read_examples.

    Texts are parted before they are packed; of each class the same share is held out. Both know all classes.
    """
    train, held = split_table(read_table(ref, options), options.holdout, seed=options.seed)
    return encode(train, options, tokenizer, limits=limits), encode(held, options, tokenizer, limits=limits)


def read_table(ref: str, options: DataOptions, *, names: Sequence[str] = ()) -> Table:
    """Read the texts of a file or hub data set, and their classes where the task has them; errors as of make_table."""
    return make_table(read_rows(ref, list_fields(options)), options, source=ref, names=names)
