"""A whole training in one value: what is read, by which method, how long and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deltaspec.errors import OptionError
from deltaspec.options.option import documented, option
from deltaspec.options.training import DataOptions, LoopOptions, RunOptions, TargetOptions

OptionValue = str | int | float | bool


@documented
@dataclass(frozen=True, slots=True)
class DataSources:
    """Where examples are read: each a csv, tsv, json, jsonl, txt or parquet file, or a data set of the hub."""

    train: str | Path = field(metadata={"about": "What is learned from."})
    held: str | Path | None = option(
        None, "What the model is evaluated on; without it a share of the training data is held out."
    )
    forget: str | Path | None = option(None, "Other data, on which is measured what the model loses.")

    def to_dict(self) -> dict[str, str | None]:
        """Return them as train.json holds them."""
        held, forget = (None if source is None else str(source) for source in (self.held, self.forget))
        return {"train": str(self.train), "held": held, "forget": forget}


@documented
@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train; everything but ``sources`` has a default.

    Examples
    --------
    >>> recipe = Recipe(DataSources("train.csv"), method="lora", method_options={"rank": 16})
    >>> recipe.loop.lr, recipe.data.task
    (0.0001, 'classification')
    """

    sources: DataSources | None = option(None, "Needed to train, not to count.")
    method: str = option("lora", "A name in METHODS.")
    method_options: Mapping[str, OptionValue] = field(
        default_factory=dict,
        metadata={"about": "Fields of the method's options; those that are left out keep their defaults."},
    )
    targets: TargetOptions = field(default_factory=TargetOptions, metadata={"about": "Which matrices it changes."})
    data: DataOptions = field(default_factory=DataOptions, metadata={"about": "How examples are read."})
    forget_data: DataOptions | None = option(
        None, "How the examples of sources.forget are read; like the others by default."
    )
    loop: LoopOptions = field(default_factory=LoopOptions, metadata={"about": "Steps, batches and learning rate."})
    rates: Sequence[float] = option((), "Learning rates to train with one after another, instead of loop.lr.")
    run: RunOptions = field(default_factory=RunOptions, metadata={"about": "Where it runs, and what it leaves behind."})


def check_recipe(given: object) -> Recipe:
    """Return a recipe as it is; whatever else is given, as to 0.1.0, is refused with how it is written now.

    Raises
    ------
    OptionError
        If it is no Recipe.
    """
    if not isinstance(given, Recipe):
        message = (
            f"Expected a deltaspec.Recipe, found {given!r}: since 0.2.0 method, data and options go into one, as in "
            "deltaspec.train(base, out, deltaspec.Recipe(deltaspec.DataSources('train.csv'), method='lora'))."
        )
        raise OptionError(message)
    return given
