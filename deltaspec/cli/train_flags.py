"""The flags of ``deltaspec train``, and their options; readable without torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import click

from deltaspec.cli.methods import parse_method, parse_targets
from deltaspec.errors import OptionError
from deltaspec.options.recipe import DataSources, Recipe
from deltaspec.options.training import PRECISIONS, SAVED, SCHEDULES, TASKS, DataOptions, LoopOptions, RunOptions

F = TypeVar("F", bound=Callable[..., Any])
FORGET = ("text", "label", "limit")
KINDS = (DataOptions, LoopOptions, RunOptions)
HELP = {
    "task": f"{', '.join(TASKS)}.",
    "text": "Column of the text, by name, or by number from 1 in a file without a line of names; or '{a} {b}'.",
    "label": "Column of the class, likewise; or a comparison, such as 2>0.",
    "length": "Tokens of an example at most; 0: what the model takes.",
    "holdout": "Share of the examples held out for evaluation, without --eval-data.",
    "limit": "At most so many examples of each file; 0: all.",
    "cut": "Cut texts that are longer than --length.",
    "epochs": "Passes over the examples.",
    "steps": "Updates of the weights, instead of --epochs.",
    "batch": "Examples at once, in each process.",
    "accumulate": "Batches that make one step.",
    "warmup": "Steps in which the rate rises; below 1, their share.",
    "schedule": f"{', '.join(SCHEDULES)}.",
    "weight_decay": "AdamW's; none on biases and norms.",
    "clip": "Largest norm of all gradients together; 0: any.",
    "seed": "Of new parameters, order, dropout and the held-out part.",
    "device": "auto, cpu, cuda or cuda:1.",
    "precision": f"Of computing, mixed: {', '.join(PRECISIONS)}.",
    "gradient_checkpointing": "Compute activations twice: less memory, more time.",
    "checkpoint_every": "Steps between checkpoints, from which a stopped training goes on; 0: none.",
    "evaluate_every": "Steps between evaluations; 0: at the beginning and the end.",
    "save": f"{', '.join(SAVED)}: the adapter, or the model with it merged in.",
}


def training_options(function: F) -> F:
    """Add a flag for each field of the options dataclasses, with their defaults; --lr takes several."""
    defaults = {field.name: field.default for kind in KINDS for field in fields(kind)}
    for name in reversed(HELP):
        flag, default = f"--{name.replace('_', '-')}", defaults[name]
        if isinstance(default, bool):
            function = click.option(flag, is_flag=True, help=HELP[name])(function)
        else:
            function = click.option(flag, default=default, show_default=True, help=HELP[name])(function)
    text = "Learning rate at its highest; several, 1e-5,1e-4, train one after another and name the best."
    return click.option("--lr", default=str(defaults["lr"]), show_default=True, metavar="X[,X…]", help=text)(function)


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
    targets = parse_targets(given)
    named = {name: given.pop(name) for name in HELP}
    settings = [{field.name: named[field.name] for field in fields(kind) if field.name in named} for kind in KINDS]
    reading, loop, run = DataOptions(**settings[0]), LoopOptions(lr=rates[0], **settings[1]), RunOptions(**settings[2])
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
