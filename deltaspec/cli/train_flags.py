"""The flags of ``deltaspec train``, and their options; readable without torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import click

from deltaspec.cli.flags import flags, take
from deltaspec.cli.methods import parse_method
from deltaspec.errors import OptionError
from deltaspec.options.recipe import DataSources, Recipe
from deltaspec.options.training import DataOptions, LoopOptions, RunOptions, TargetOptions

F = TypeVar("F", bound=Callable[..., Any])
FORGET = ("text", "label", "limit")
KINDS = (DataOptions, LoopOptions, RunOptions)
RATE = next(item for item in fields(LoopOptions) if item.name == "lr")


def training_options(function: F) -> F:
    """Add a flag for each field of the options dataclasses; --lr takes several, --seed is for data and loop."""
    function = flags(RunOptions)(function)
    function = flags(LoopOptions, *(item.name for item in fields(LoopOptions) if item.name != "lr"))(function)
    function = flags(DataOptions, *(item.name for item in fields(DataOptions) if item.name != "seed"))(function)
    text = f"{RATE.metadata['about']} Several, 1e-5,1e-4, train one after another and name the best."
    return click.option("--lr", default=str(RATE.default), show_default=True, metavar="X[,X…]", help=text)(function)


def parse_training(data: str, given: dict[str, Any]) -> Recipe:
    """Take all flags of a training on these data out of a command's arguments.

    Raises
    ------
    OptionError
        If one makes no sense.
    """
    if given["forget"] is None and (unused := [n for n in FORGET if given[f"forget_{n}"] is not None]):
        message = f"--forget-{unused[0]} says how --forget is read: pass --forget with it."
        raise OptionError(message)
    rates = _parse_rates(given.pop("lr"))
    method, chosen = parse_method(given)
    targets = take(TargetOptions, given)
    loop = take(LoopOptions, given | {"lr": rates[0]})
    reading, run = take(DataOptions, given), take(RunOptions, given)
    for name in {item.name for item in fields(LoopOptions)} & given.keys():
        del given[name]
    others = {name: given.pop(f"forget_{name}") for name in FORGET}
    return Recipe(
        DataSources(data, held=given.pop("eval_data"), forget=given.pop("forget")),
        method=method,
        method_options=chosen,
        targets=targets,
        data=reading,
        forget_data=replace(reading, **{name: value for name, value in others.items() if value is not None}),
        loop=loop,
        rates=rates if len(rates) > 1 else [],
        run=run,
    )


def _parse_rates(text: str) -> list[float]:
    try:
        rates = [float(piece) for piece in text.split(",")]
    except ValueError as cause:
        message = f"--lr is '{text}': expected a number such as 1e-4, or several: 1e-5,1e-4."
        raise OptionError(message) from cause
    return [LoopOptions(lr=rate).lr for rate in rates]
