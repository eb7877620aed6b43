"""Which ranks: the flags of the rank policies, of which a command takes one, and what they mean together."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from deltaspec.cli.flags import flags
from deltaspec.errors import OptionError
from deltaspec.options import POLICY_HELP, RankOptions

F = TypeVar("F", bound=Callable[..., Any])
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}
NUMBER = re.compile(r"(-?[0-9]+(?:\.[0-9]+)?)\s*([kmgb]?)b?", re.IGNORECASE)
SEVERAL = {name: text for name, text in POLICY_HELP.items() if name != "above_rounding"}
"""Policies with a number, of which the command line takes several by commas."""
FORM = ("dtype", "target", "rslora")
"""Fields of FormOptions that commands without a tuned checkpoint take."""


def rank_options(*, above_rounding: bool) -> Callable[[F], F]:
    """Add a flag for each policy, and --min-rank and --max-rank."""

    def add(function: F) -> F:
        function = flags(RankOptions, "minimum", "maximum")(function)
        if above_rounding:
            text = POLICY_HELP["above_rounding"]
            function = click.option("--above-rounding", is_flag=True, help=text)(function)
        for name, text in reversed(SEVERAL.items()):
            function = click.option(f"--{name}", metavar="X[,X…]", help=text)(function)
        return function

    return add


def parse_ranks(given: dict[str, Any], *, fallback: str = "") -> RankOptions:
    """Take the rank flags out of a command's arguments; exactly one policy may be named.

    Raises
    ------
    OptionError
        If two policies are named, none where there is no fallback, or a number is none.
    """
    texts = {name: given.pop(name, None) for name in SEVERAL}
    named = {name: text for name, text in texts.items() if text is not None}
    if given.pop("above_rounding", False):
        named["above_rounding"] = "1"
    if not named and fallback:
        named = {"rank": fallback}
    if len(named) != 1:
        known = ", ".join(f"--{name}" for name in texts)
        found = " and ".join(f"--{name.replace('_', '-')}" for name in named) or "none"
        message = f"Pass one of {known}: found {found}."
        raise OptionError(message)
    policy, text = next(iter(named.items()))
    amounts = tuple(_number(piece, flag=policy) for piece in text.split(","))
    bounds = {name: given.pop(name) for name in ("minimum", "maximum", "weighted") if name in given}
    return RankOptions(policy, amounts, **bounds)


def _number(text: str, *, flag: str) -> float:
    match = NUMBER.fullmatch(text.strip())
    if match is None:
        message = f"--{flag} is '{text}': expected a number, such as 16, 0.9, 2M or 50MB."
        raise OptionError(message)
    return float(match[1]) * UNITS[match[2].lower()]
