"""A whole training in one value: what is read, by which method, how long and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deltaspec.options.training import DataOptions, LoopOptions, RunOptions, TargetOptions

OptionValue = str | int | float | bool


@dataclass(frozen=True, slots=True)
class DataSources:
    """Where examples are read: each a csv, tsv, json, jsonl, txt or parquet file, or a data set of the hub.

    Parameters
    ----------
    train : str or Path
        What is learned from.
    held : str or Path, optional
        What it is evaluated on; without it a share of ``train`` is held out.
    forget : str or Path, optional
        Other data, on which is measured what is lost.
    """

    train: str | Path
    held: str | Path | None = None
    forget: str | Path | None = None

    def to_dict(self) -> dict[str, str | None]:
        """Return them as train.json holds them."""
        held, forget = (None if source is None else str(source) for source in (self.held, self.forget))
        return {"train": str(self.train), "held": held, "forget": forget}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train; everything but ``sources`` has a default.

    Parameters
    ----------
    sources : DataSources, optional
        Needed to train, not to count.
    method : str
        A name in METHODS.
    method_options : mapping of str to value
        Fields of the method's options; those left out keep their defaults.
    targets : TargetOptions
        Which matrices it changes; the method's own by default.
    data : DataOptions
        How examples are read.
    forget_data : DataOptions, optional
        How those of ``sources.forget`` are read; like the others by default.
    loop : LoopOptions
        Steps, batches and learning rate.
    rates : sequence of float
        Learning rates to train with one after another, instead of ``loop.lr``.
    run : RunOptions
        Where it runs, and what it leaves behind.

    Examples
    --------
    >>> recipe = Recipe(DataSources("train.csv"), method="lora", method_options={"rank": 16})
    >>> recipe.loop.lr, recipe.data.task
    (0.0001, 'classification')
    """

    sources: DataSources | None = None
    method: str = "lora"
    method_options: Mapping[str, OptionValue] = field(default_factory=dict)
    targets: TargetOptions = field(default_factory=TargetOptions)
    data: DataOptions = field(default_factory=DataOptions)
    forget_data: DataOptions | None = None
    loop: LoopOptions = field(default_factory=LoopOptions)
    rates: Sequence[float] = ()
    run: RunOptions = field(default_factory=RunOptions)
