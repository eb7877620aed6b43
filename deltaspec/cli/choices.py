"""Options that several commands share: which ranks, which form."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from deltaspec.errors import OptionError
from deltaspec.options import DTYPES, EXTRAS, TARGETS, FormOptions, RankOptions

F = TypeVar("F", bound=Callable[..., Any])
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}
NUMBER = re.compile(r"(-?[0-9]+(?:\.[0-9]+)?)\s*([kmgb]?)b?", re.IGNORECASE)
POLICY_HELP = {
    "rank": "This many directions of every matrix; 8,16,64 writes three adapters.",
    "energy": "Fewest directions that keep this share of ‖ΔW‖², matrix by matrix.",
    "error": "Fewest directions with at most this relative error, matrix by matrix.",
    "params": "A budget of numbers, spent where it keeps most: 2M.",
    "size": "A budget of bytes, spent where it keeps most: 50MB.",
}


def rank_options(*names: str) -> Callable[[F], F]:
    """Add the flags of the named policies, and --min-rank and --max-rank."""

    def add(function: F) -> F:
        for flag in ("--max-rank", "--min-rank"):
            function = click.option(flag, default=0, metavar="R", help="Bound of every rank; 0: none.")(function)
        if "above_rounding" in names:
            text = "Directions above what storage rounding explains."
            function = click.option("--above-rounding", is_flag=True, help=text)(function)
        for name in reversed([name for name in names if name in POLICY_HELP]):
            function = click.option(f"--{name}", metavar="X[,X…]", help=POLICY_HELP[name])(function)
        return function

    return add


def form_options(*, extras: bool) -> Callable[[F], F]:
    """Add the flags of FormOptions."""

    def add(function: F) -> F:
        function = click.option("--rslora", is_flag=True, help="Write α = √r for α/√r scaling.")(function)
        if extras:
            text = "Also changes of biases, or all that PEFT can hold, whole."
            function = click.option("--split-fused", is_flag=True, help="Factorise parts of fused matrices.")(function)
            function = click.option("--extras", default="none", show_default=True, help=f"{', '.join(EXTRAS)}. {text}")(
                function
            )
        text = "Who loads it; vllm and llamacpp: linear layers, one rank."
        function = click.option("--target", default="peft", show_default=True, help=f"{', '.join(TARGETS)}. {text}")(
            function
        )
        return click.option("--dtype", default="auto", show_default=True, help=f"Of factors: {', '.join(DTYPES)}.")(
            function
        )

    return add


def parse_ranks(given: dict[str, Any], *, fallback: str = "") -> RankOptions:
    """Take the rank flags out of a command's arguments; exactly one policy may be named.

    Raises
    ------
    OptionError
        If two policies are named, none where there is no fallback, or a number is none.
    """
    bounds = {"minimum": given.pop("min_rank"), "maximum": given.pop("max_rank")}
    weighted = given.pop("weighted", False)
    texts = {name: given.pop(name, None) for name in POLICY_HELP}
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
    name, text = next(iter(named.items()))
    amounts = tuple(_number(piece, flag=name) for piece in text.split(","))
    return RankOptions(name, amounts, weighted=weighted, **bounds)


def parse_form(given: dict[str, Any]) -> FormOptions:
    """Take the flags of FormOptions out of a command's arguments."""
    names = ("dtype", "target", "extras", "rslora", "split_fused")
    return FormOptions(**{name: given.pop(name) for name in names if name in given})


def _number(text: str, *, flag: str) -> float:
    match = NUMBER.fullmatch(text.strip())
    if match is None:
        message = f"--{flag} is '{text}': expected a number, such as 16, 0.9, 2M or 50MB."
        raise OptionError(message)
    return float(match[1]) * UNITS[match[2].lower()]
